"""Derivatives of a smoothed function from its values on a sparse grid."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

#: Most nodes that a grid may have.
MOST_NODES = 50_000


class PointDerivatives(NamedTuple):
    """Value, gradient and diagonal of the Hessian of a function at points: ``(B,)``, ``(B, D)``, ``(B, D)``."""

    value: Tensor
    gradient: Tensor
    second: Tensor


class _Rule(NamedTuple):
    zero: float  # weight of the node 0
    nodes: tuple[float, ...]  # the other ones
    weights: tuple[float, ...]


@lru_cache
def _rule(level: int) -> _Rule:
    """The Gauss-Hermite rule of ``level`` nodes for a standard normal; 0 apart, for a grid stores what is not 0."""
    nodes, weights = hermegauss(level)
    # nodes of opposite sign must cancel to the last bit
    nodes = (nodes - nodes[::-1]) / 2.0
    weights = (weights + weights[::-1]) / (2.0 * weights.sum())
    away = np.abs(nodes) > 1e-8
    return _Rule(float(weights[~away].sum()), tuple(nodes[away].tolist()), tuple(weights[away].tolist()))


def count_grid_nodes(dim: int, level: int) -> int:
    """Number of nodes of :func:`smolyak_gauss_hermite`, without making them.

    Example:
        >>> count_grid_nodes(21, 3), count_grid_nodes(21, 5)
        (925, 145293)

    """
    _check(dim, level)
    total = int(_counts(_weight_at(dim, level, (), ())))
    for active in range(1, min(dim, level - 1) + 1):
        here = sum(
            math.prod(len(_rule(each).nodes) for each in levels)
            for levels in _levels(active, level - 1)
            if _counts(_weight_at(dim, level, levels, (0,) * active))
        )
        total += math.comb(dim, active) * here
    return total


def smolyak_gauss_hermite(dim: int, level: int) -> tuple[Tensor, Tensor]:
    r"""Nodes and weights of Smolyak's sparse grid for a standard normal in ``dim`` dimensions.

    .. math:: \mathbb{E}\, g(\delta) \approx \sum_{|i| = \max(D, L)}^{D + L - 1} (-1)^{D + L - 1 - |i|}
        \binom{D - 1}{D + L - 1 - |i|} \big(U_{i_1} \otimes \dots \otimes U_{i_D}\big) g = \sum_j w_j \, g(\delta_j)

    with :math:`U_l` the Gauss-Hermite rule of :math:`l` nodes, level :math:`L`, and :math:`|i| = i_1 + \dots + i_D`.
    Exact for polynomials of total degree :math:`2 L - 1`. Level 3 has :math:`2 D^2 + 2 D + 1` nodes. Each node is there
    once, and its mirror image :math:`-\delta_j` has the same weight; many weights are negative, and large where ``dim``
    is.

    Papers: Quadrature and interpolation formulas for tensor products of certain classes of functions (Smolyak, 1963);
    Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks (arXiv 2308.09858).

    Args:
        dim: Number of dimensions, at least 1.
        level: 1 to 5.

    Returns:
        Nodes, float64 of shape ``(J, dim)``, and weights, float64 of shape ``(J,)``, which sum to 1.

    Raises:
        ValueError: If an argument is out of its range, or the grid has more than 50,000 nodes.

    Example:
        >>> nodes, weights = smolyak_gauss_hermite(2, 3)
        >>> nodes.shape, round(weights.sum().item(), 9)
        (torch.Size([13, 2]), 1.0)
        >>> round((weights * nodes[:, 0] ** 4).sum().item(), 9)
        3.0

    """
    nodes = count_grid_nodes(dim, level)
    if nodes > MOST_NODES:
        raise ValueError(
            f"Expected arguments `dim` and `level` to make a grid of at most {MOST_NODES} nodes, but got dim={dim} and"
            f" level={level}, which make {nodes}. Take a lower level, or random directions: SteinDerivatives."
        )
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    weights: list[float] = []
    centre = _weight_at(dim, level, (), ())
    if _counts(centre):
        weights.append(centre)
    for active in range(1, min(dim, level - 1) + 1):
        # the same for any choice of dimensions in which a node is not 0
        pattern = [
            (tuple(_rule(each).nodes[n] for each, n in zip(levels, places, strict=True)), weight)
            for levels in _levels(active, level - 1)
            for places in itertools.product(*(range(len(_rule(each).nodes)) for each in levels))
            if _counts(weight := _weight_at(dim, level, levels, places))
        ]
        for where in itertools.combinations(range(dim), active):
            for node, weight in pattern:
                rows += [len(weights)] * active
                columns += where
                values += node
                weights.append(weight)
    grid = torch.zeros(len(weights), dim, dtype=torch.float64)
    grid[rows, columns] = torch.tensor(values, dtype=torch.float64)
    return grid, torch.tensor(weights, dtype=torch.float64)


def smoothed_derivatives(
    values: Tensor, nodes: Tensor, weights: Tensor, sigma: float, reference: Tensor | None = None
) -> PointDerivatives:
    r"""Derivatives of :math:`u_\sigma(x) = \mathbb{E}\, f(x + \sigma \delta)`, from values of :math:`f` alone.

    By Stein's identity, with the expectation replaced by a sum over nodes,

    .. math:: u = \sum_j w_j f_j, \qquad \partial_i u = \sum_j w_j \frac{\delta_{ji}}{\sigma} f_j, \qquad
        \partial_i^2 u = \sum_j w_j \frac{\delta_{ji}^2 - 1}{\sigma^2} (f_j - f_0) .

    Exact where the nodes are exact for :math:`\delta_i^2 f`, as those of a sparse grid of level 3 are for quadratics;
    those of levels 1 and 2 are not, and their second derivatives are wrong. All sums are in float64: the weights of a
    sparse grid are large and alternate in sign, so that rounding of the values, times
    :math:`\sum_j |w_j| / \sigma^2`, is what is left.

    Args:
        values: :math:`f_j = f(x_b + \sigma \delta_j)`, shape ``(B, J)``.
        nodes: The :math:`\delta_j`: shape ``(J, D)``, or ``(B, J, D)`` where every point has its own.
        weights: The :math:`w_j`, shape ``(J,)``.
        sigma: Standard deviation of the smoothing, positive.
        reference: :math:`f_0`, shape ``(B,)``: :math:`f(x_b)` where the nodes are random, which keeps the variance
            down. Grids do not need it, for a constant adds nothing; by default it is the mean of the values.

    Returns:
        Float64.

    Raises:
        ValueError: If ``sigma`` is not positive.

    Example:
        >>> nodes, weights = smolyak_gauss_hermite(2, 3)
        >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> values = ((x + 0.1 * nodes) ** 2).sum(dim=1)[None]
        >>> value, gradient, second = smoothed_derivatives(values, nodes, weights, 0.1)
        >>> [round(number, 6) for number in (*value.tolist(), *gradient[0].tolist(), *second[0].tolist())]
        [5.02, 2.0, 4.0, 2.0, 2.0]

    """
    if sigma <= 0.0:
        raise ValueError(f"Expected argument `sigma` to be positive, but got {sigma}.")
    values, nodes, weights = values.double(), nodes.double(), weights.double()
    offset = values.mean(dim=1) if reference is None else reference.double()
    differences = (values - offset[:, None]) * weights
    rows = "bjd" if nodes.ndim == 3 else "jd"
    gradient = torch.einsum(f"bj,{rows}->bd", differences, nodes) / sigma
    second = torch.einsum(f"bj,{rows}->bd", differences, nodes.square() - 1.0) / sigma**2
    return PointDerivatives(offset + differences.sum(dim=1), gradient, second)


def _check(dim: int, level: int) -> None:
    if dim < 1:
        raise ValueError(f"Expected argument `dim` to be a positive integer, but got {dim}.")
    if level not in range(1, 6):
        raise ValueError(f"Expected argument `level` to be an integer from 1 to 5, but got {level}.")


def _counts(weight: float) -> bool:
    """Whether a node is part of the grid: in few dimensions some weights cancel."""
    return abs(weight) > 1e-12


@lru_cache
def _levels(active: int, excess: int) -> tuple[tuple[int, ...], ...]:
    """Levels of ``active`` rules from 2 on, whose excess over 1 is at most ``excess`` in all."""
    return tuple(
        levels for levels in itertools.product(range(2, excess + 2), repeat=active) if sum(levels) - active <= excess
    )


def _weight_at(dim: int, level: int, levels: tuple[int, ...], places: tuple[int, ...]) -> float:
    """Combined weight of a node whose entries other than 0 are those of ``levels`` at ``places``.

    All other dimensions are at 0, which rules with an odd number of nodes share: each spends some of what is left of
    the excess, and weighs in with its weight of 0.
    """
    spent = sum(levels) - len(levels)
    weight = math.prod(_rule(each).weights[n] for each, n in zip(levels, places, strict=True))
    return weight * math.fsum(
        (-1) ** (level - 1 - spent - rest)
        * math.comb(dim - 1, level - 1 - spent - rest)
        * _zeros(dim - len(levels), rest)
        for rest in range(level - spent)
    )


@lru_cache
def _zeros(dims: int, excess: int) -> float:
    """Sum over levels of ``dims`` rules, of that excess in all, of the product of their weights at 0."""
    if dims == 0:
        return float(excess == 0)
    # polynomial in the excess of one rule, to the power of the dimensions
    one = [_rule(each + 1).zero for each in range(excess + 1)]
    power = [1.0] + [0.0] * excess
    for _ in range(dims):
        power = [sum(power[k] * one[n - k] for k in range(n + 1)) for n in range(excess + 1)]
    return power[excess]
