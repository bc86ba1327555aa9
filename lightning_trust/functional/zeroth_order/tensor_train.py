"""Matrices in tensor-train form: what they are, how they are found, and how they are multiplied with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Reading or writing a number takes about as long as so many multiply-adds of a large matrix product. Multiply-adds
# alone would choose many small products, core by core, which on a CPU take longer than the dense layer they replace.
_MOVE = 40


Side = Literal["left", "right"]


class Contraction(NamedTuple):
    """How an input is multiplied with a matrix in tensor-train form.

    Attributes:
        side: The side of the train on which the input goes in.
        groups: First and last core (exclusive) of what is multiplied out before it meets the input, left to right. One
            group of all cores is the whole matrix; as many groups as cores is the input through core by core.
        multiply_adds: Number of them.
        moved: Numbers read and written on the way.

    """

    side: Side
    groups: tuple[tuple[int, int], ...]
    multiply_adds: int
    moved: int


def tt_matrix(cores: Sequence[Tensor]) -> Tensor:
    r"""The matrix whose tensor-train form has these cores.

    .. math:: W_{(i_1 \dots i_d), (j_1 \dots j_d)} = G_1[:, i_1, j_1, :] \cdots G_d[:, i_d, j_d, :]

    Paper: Tensorizing Neural Networks (NeurIPS 2015).

    Args:
        cores: The :math:`G_k`, shape :math:`(r_{k-1}, m_k, n_k, r_k)` with :math:`r_0 = r_d = 1`.

    Returns:
        Shape :math:`(\prod_k m_k, \prod_k n_k)`.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [10.0]])
        >>> tt_matrix([a[None, :, :, None], b[None, :, :, None]])  # rank 1: a Kronecker product
        tensor([[ 1.,  2.],
                [10., 20.]])

    """
    return _merged(cores).squeeze(3).squeeze(0)


def tt_linear(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    r""":math:`x W^\top` for a matrix in tensor-train form, multiplied in the order that costs least.

    Args:
        x: Shape ``(B, N)``.
        cores: As in :func:`tt_matrix`.

    Returns:
        Shape ``(B, M)``.

    Example:
        >>> cores = [torch.ones(1, 2, 3, 2), torch.ones(2, 2, 3, 1)]
        >>> tt_linear(torch.ones(1, 9), cores)
        tensor([[18., 18., 18., 18.]])

    """
    plan = contraction(tuple((core.shape[0], core.shape[1], core.shape[2], core.shape[3]) for core in cores), len(x))
    groups = [_merged(cores[start:stop]) for start, stop in plan.groups]
    rows = len(x)
    if plan.side == "left":
        # (rows and output modes so far, rank and input modes of the group, input modes to come)
        state = x
        for core in groups:
            left, m, n, right = core.shape
            matrix = core.permute(1, 3, 0, 2).reshape(m * right, left * n)
            state = _applied(matrix, state.reshape(rows, left * n, -1))
            rows *= m
        return state.reshape(len(x), -1)
    done = 1
    state = x
    for core in reversed(groups):
        left, m, n, right = core.shape
        # (rows and input modes to come, input modes and rank of the group, output modes so far)
        matrix = core.reshape(left * m, n * right)
        state = _applied(matrix, state.reshape(-1, n * right, done))
        done *= m
    return state.reshape(len(x), -1)


@lru_cache(maxsize=4096)
def contraction(shapes: tuple[tuple[int, int, int, int], ...], rows: int) -> Contraction:
    r"""The cheapest way to multiply ``rows`` inputs with a matrix in tensor-train form.

    Neighbouring cores may be multiplied out before they meet the input. All ways to cut the train into such groups are
    compared, from both ends: building the whole matrix, which is cheapest where the rank is high or the inputs many,
    and going core by core, which is cheapest where both are low, are the two extremes.

    Args:
        shapes: Of the cores, :math:`(r_{k-1}, m_k, n_k, r_k)`.
        rows: Number of inputs.

    Returns:
        The best :class:`Contraction`.

    Example:
        >>> square = ((1, 32, 32, 2), (2, 32, 32, 1))
        >>> contraction(square, rows=100)
        Contraction(side='right', groups=((0, 1), (1, 2)), multiply_adds=13107200, moved=614400)
        >>> contraction(((1, 32, 32, 100), (100, 32, 32, 1)), rows=10_000).groups
        ((0, 2),)

    """
    sides: tuple[Side, Side] = ("right", "left")
    return min((_cheapest(shapes, rows, side) for side in sides), key=_price)


def largest_ranks(out_shape: Sequence[int], in_shape: Sequence[int]) -> list[int]:
    """The largest ranks that cores can make use of, for the bonds between them.

    Example:
        >>> largest_ranks((4, 4, 4, 4), (1, 5, 2, 1))
        [4, 32, 4]

    """
    sizes = [m * n for m, n in zip(out_shape, in_shape, strict=True)]
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]


def tt_svd(matrix: Tensor, out_shape: Sequence[int], in_shape: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    r"""The tensor-train form of a matrix, by singular value decompositions from left to right (TT-SVD).

    Exact where the ranks are the largest; else within :math:`\sqrt{d - 1}` times the least error that the ranks allow.

    Paper: Tensor-Train Decomposition (SIAM Journal on Scientific Computing 2011).

    Args:
        matrix: Shape ``(M, N)``.
        out_shape: :math:`m_1, \dots, m_d`, whose product is ``M``.
        in_shape: :math:`n_1, \dots, n_d`, whose product is ``N``.
        ranks: :math:`r_1, \dots, r_{d-1}`; lower ones are used where there are not so many singular values.

    Returns:
        The cores, in the type of the matrix, with entries of the same mean square; computed in float64.

    Example:
        >>> matrix = torch.arange(36.0).reshape(6, 6)
        >>> cores = tt_svd(matrix, (2, 3), (3, 2), ranks=[6])
        >>> torch.allclose(tt_matrix(cores), matrix, atol=1e-5)
        True

    """
    count = len(out_shape)
    tensor = matrix.detach().double().reshape(*out_shape, *in_shape)
    # (m_1, n_1, m_2, n_2, ...)
    rest = tensor.permute([axis for k in range(count) for axis in (k, count + k)]).reshape(1, -1)
    cores: list[Tensor] = []
    left = 1
    for m, n, rank in zip(out_shape, in_shape, [*ranks, 1], strict=True):
        if len(cores) == count - 1:
            cores.append(rest.reshape(left, m, n, 1))
            break
        basis, values, others = torch.linalg.svd(rest.reshape(left * m * n, -1), full_matrices=False)
        right = min(rank, len(values))
        cores.append(basis[:, :right].reshape(left, m, n, right))
        rest = values[:right, None] * others[:right]
        left = right
    # all of the size is in the last core; entries of one size suit one step size
    sizes = torch.stack([core.square().mean().sqrt() for core in cores]).clamp(min=torch.finfo(rest.dtype).tiny)
    common = sizes.log().mean().exp()
    return [(core * (common / size)).to(matrix.dtype) for core, size in zip(cores, sizes, strict=True)]


def _merged(cores: Sequence[Tensor]) -> Tensor:
    """Neighbouring cores as one of shape ``(r_left, M, N, r_right)``."""
    whole = cores[0]
    for core in cores[1:]:
        left, m, n, _ = whole.shape
        _, p, q, right = core.shape
        whole = torch.einsum("amnr,rpqb->ampnqb", whole, core).reshape(left, m * p, n * q, right)
    return whole


def _applied(matrix: Tensor, state: Tensor) -> Tensor:
    """A matrix applied to the middle of ``(rows, middle, last)``."""
    # one large product is much faster than many with a single column
    return (state.squeeze(2) @ matrix.T).unsqueeze(2) if state.shape[2] == 1 else matrix @ state


def _cheapest(shapes: tuple[tuple[int, int, int, int], ...], rows: int, side: Side) -> Contraction:
    # through the first `stop` cores: every price is a sum over groups, so that the best way goes on from a best one
    until = [Contraction(side, (), 0, 0)]
    for stop in range(1, len(shapes) + 1):
        options = []
        for start in range(stop):
            before = until[start]
            adds, moved = _group_price(shapes, start, stop, rows, side)
            groups = (*before.groups, (start, stop))
            options.append(Contraction(side, groups, before.multiply_adds + adds, before.moved + moved))
        until.append(min(options, key=_price))
    return until[-1]


def _price(way: Contraction) -> int:
    return way.multiply_adds + _MOVE * way.moved


def _group_price(
    shapes: tuple[tuple[int, int, int, int], ...], start: int, stop: int, rows: int, side: Side
) -> tuple[int, int]:
    adds = moved = 0
    left, m, n, right = shapes[start]
    for _, p, q, after in shapes[start + 1 : stop]:
        adds += left * m * n * right * p * q * after
        m, n, right = m * p, n * q, after
        moved += left * m * n * right
    outer, inner = shapes[:start], shapes[stop:]
    if side == "left":
        around = math.prod(shape[1] for shape in outer) * math.prod(shape[2] for shape in inner)
        middle_in, middle_out = left * n, m * right
    else:
        around = math.prod(shape[2] for shape in outer) * math.prod(shape[1] for shape in inner)
        middle_in, middle_out = n * right, left * m
    adds += rows * around * middle_in * middle_out
    moved += rows * around * (middle_in + middle_out)
    return adds, moved
