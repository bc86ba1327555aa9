"""Linear layers whose weights are in tensor-train form."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_trust.functional.zeroth_order import largest_ranks, tt_linear, tt_matrix, tt_svd

Format = Literal["ttm", "tt"]

# Why no layer of the libraries for tensor trains is the base: tltorch's FactorizedLinear goes through all cores, or
# builds the matrix, as its user says once and for all, and both took longer than what `contraction` finds (235 and 70
# against 10 ms for 9,250 rows through 512 to 512 features of rank 2, on one core); it starts from weights of five times
# the variance, keeps a backend that is global, and has no format with a core a mode; torchtt.nn goes through all cores.
# What is left, the cores themselves, is a list of tensors. Both are compared with in the tests.


class TTLinear(nn.Module):
    r"""A linear layer :math:`y = x W^\top + b` whose weight is in tensor-train form.

    Under ``format="ttm"`` a core belongs to a pair of modes,

    .. math:: W_{(i_1 \dots i_d), (j_1 \dots j_d)} = G_1[:, i_1, j_1, :] \cdots G_d[:, i_d, j_d, :], \qquad
        G_k \in \mathbb{R}^{r_{k-1} \times m_k \times n_k \times r_k},

    and under ``"tt"`` to one mode, those of the output before those of the input. Cores and input are multiplied in the
    order that costs least for the number of rows (:func:`~lightning_trust.functional.zeroth_order.contraction`); the
    weight is built only where that is cheapest.

    The cores start normal with one standard deviation, for which the entries of the weight have variance
    :math:`1 / N`; the bias starts as that of ``nn.Linear``.

    Papers: Tensorizing Neural Networks (NeurIPS 2015); Tensor-Compressed Back-Propagation-Free Training for
    (Physics-Informed) Neural Networks (arXiv 2308.09858).

    Shape:
        - Input: ``(..., in_features)``.
        - Output: ``(..., out_features)``.

    Args:
        in_features: :math:`N`.
        out_features: :math:`M`.
        in_shape: :math:`n_1, \dots, n_d`, whose product is :math:`N`.
        out_shape: :math:`m_1, \dots, m_d`, whose product is :math:`M`.
        rank: :math:`r_k` between the cores: one for all, or one a bond.
        bias: Whether there is a bias.
        format: ``"ttm"`` or ``"tt"``.

    Attributes:
        cores: The parameters, of shape ``(r, m, n, r')``, or ``(r, m, r')`` under ``"tt"``.
        ranks: What the ranks came to be.

    Raises:
        ValueError: If a shape does not multiply up to its number of features, the shapes differ in length under
            ``"ttm"``, or a rank is below 1.

    Warns:
        UserWarning: If a rank is larger than any matrix of these shapes can have; it is lowered to that.

    Example:
        >>> layer = TTLinear(784, 256, (4, 7, 7, 4), (4, 4, 4, 4), rank=4, bias=False)
        >>> layer.num_parameters, layer.to_dense().weight.numel()
        (1024, 200704)
        >>> layer(torch.ones(3, 784)).shape
        torch.Size([3, 256])

    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        rank: int | Sequence[int] = 2,
        bias: bool = True,
        format: Format = "ttm",
    ) -> None:
        super().__init__()
        if format not in get_args(Format):
            raise ValueError(f"Expected argument `format` to be one of {list(get_args(Format))}, but got {format!r}.")
        for name, shape, features in (("in", in_shape, in_features), ("out", out_shape, out_features)):
            if min(shape, default=0) < 1 or math.prod(shape) != features:
                raise ValueError(
                    f"Expected argument `{name}_shape` to be positive integers whose product is"
                    f" {name}_features={features}, but got {tuple(shape)}, whose product is {math.prod(shape)}."
                )
        if format == "ttm" and len(in_shape) != len(out_shape):
            raise ValueError(
                "Expected arguments `in_shape` and `out_shape` to be of the same length under format='ttm', but got"
                f" {tuple(in_shape)} and {tuple(out_shape)}."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.in_shape = tuple(in_shape)
        self.out_shape = tuple(out_shape)
        self.format: Format = format
        # a core with one mode is one of a matrix whose other mode is of size 1
        self._modes = (
            (self.out_shape, self.in_shape)
            if format == "ttm"
            else ((*self.out_shape, *(1 for _ in in_shape)), (*(1 for _ in out_shape), *self.in_shape))
        )
        self.ranks = tuple(_checked_ranks(rank, largest_ranks(*self._modes)))
        bonds = (1, *self.ranks, 1)
        shapes = [(bonds[k], m, n, bonds[k + 1]) for k, (m, n) in enumerate(zip(*self._modes, strict=True))]
        self.cores = nn.ParameterList(torch.empty(self._stored(shape)) for shape in shapes)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw cores and bias anew."""
        # an entry of the weight is a sum over all ranks of products of so many independent numbers
        scale = (1.0 / (self.in_features * math.prod(self.ranks))) ** (0.5 / len(self.cores))
        for core in self.cores:
            nn.init.normal_(core, std=scale)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        rank: int | Sequence[int] = 2,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        format: Format = "ttm",
    ) -> TTLinear:
        """The layer that is nearest to a dense one (within a factor: TT-SVD), exact where the ranks suffice.

        Args:
            linear: A dense layer.
            rank: As in the constructor.
            in_shape: As in the constructor; chosen by itself if None, as :func:`tensorize` does.
            out_shape: Like ``in_shape``.
            format: As in the constructor.

        Returns:
            A new layer on the device and in the type of the dense one.

        Example:
            >>> dense = nn.Linear(6, 4)
            >>> layer = TTLinear.from_dense(dense, rank=4, in_shape=(2, 3), out_shape=(2, 2))
            >>> x = torch.randn(5, 6)
            >>> torch.allclose(layer(x), dense(x), atol=1e-5)
            True

        """
        chosen = _shapes(linear.in_features, linear.out_features)
        layer = cls(
            linear.in_features,
            linear.out_features,
            chosen[0] if in_shape is None else in_shape,
            chosen[1] if out_shape is None else out_shape,
            rank,
            linear.bias is not None,
            format,
        ).to(linear.weight.device, linear.weight.dtype)
        found = tt_svd(linear.weight, *layer._modes, layer.ranks)
        with torch.no_grad():
            for core, value in zip(layer.cores, found, strict=True):
                core.copy_(value.reshape(core.shape))
            if layer.bias is not None and linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def to_dense(self) -> nn.Linear:
        """A dense layer with the same weight and bias."""
        weight = tt_matrix(self._pairs()).detach()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear = linear.to(weight.device, weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    @property
    def num_parameters(self) -> int:
        """Number of scalars in cores and bias."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Inputs ``(..., in_features)`` -> outputs ``(..., out_features)``."""
        result = tt_linear(x.reshape(-1, self.in_features), self._pairs())
        if self.bias is not None:
            result = result + self.bias
        return result.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.in_features}, {self.out_features}, in_shape={self.in_shape}, out_shape={self.out_shape},"
            f" ranks={self.ranks}, bias={self.bias is not None}, format={self.format!r}"
        )

    def _stored(self, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
        left, m, n, right = shape
        return shape if self.format == "ttm" else (left, m * n, right)

    def _pairs(self) -> list[Tensor]:
        """The cores with two modes each."""
        if self.format == "ttm":
            return list(self.cores)
        out = len(self.out_shape)
        return [core.unsqueeze(2) if k < out else core.unsqueeze(1) for k, core in enumerate(self.cores)]


def tensorize(
    module: nn.Module,
    rank: int = 4,
    min_params: int = 1024,
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None,
    format: Format = "ttm",
    keep_weights: bool = False,
) -> nn.Module:
    """A network whose linear layers are :class:`TTLinear`, out of any network.

    Zeroth-order estimates of a gradient have an error that grows with the number of parameters, of which a layer in
    tensor-train form has few. Everything else of the network is a copy; the network that came in is not changed. A
    layer whose weight another module shares stays dense, and so does one that would not get smaller.

    Paper: Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks (arXiv 2308.09858).

    Args:
        module: The network.
        rank: Rank of the layers; lowered without a word where the modes of a layer do not allow so much.
        min_params: Fewest entries of a weight that is converted.
        shapes: Name of a layer -> its ``(in_shape, out_shape)``; these are converted whatever their size. Other layers
            get four modes each way, as equal as their prime factors allow.
        format: See :class:`TTLinear`.
        keep_weights: Whether the layers start near the weights of the network (TT-SVD), or anew.

    Returns:
        A new network.

    Raises:
        ValueError: If there is no layer to convert, ``shapes`` names one that is no plain ``nn.Linear`` or shares its
            weight, or an argument is out of its range.

    Example:
        >>> from lightning_trust.nn import SineMLP
        >>> shapes = {"0": ((1, 1, 3, 7), (8, 4, 4, 4)), "1": ((4, 4, 4, 8), (8, 4, 4, 4))}
        >>> dense = SineMLP(21, 512, 3, 1)
        >>> small = tensorize(dense, rank=2, shapes=shapes)
        >>> [sum(p.numel() for p in network.parameters()) for network in (dense, small)]
        [274433, 1929]

    """
    if rank < 1:
        raise ValueError(f"Expected argument `rank` to be a positive integer, but got {rank}.")
    shapes = dict(shapes or {})
    network = copy.deepcopy(module)
    plain = {name: layer for name, layer in network.named_modules() if type(layer) is nn.Linear}
    held = Counter(id(p) for each in network.modules() for p in each.parameters(recurse=False))
    for name in shapes:
        if name not in plain:
            raise ValueError(f"Expected argument `shapes` to name layers of {sorted(plain)}, but got '{name}'.")
        if held[id(plain[name].weight)] > 1:
            raise ValueError(f"Cannot convert layer '{name}': another module shares its weight.")
    new: dict[int, TTLinear] = {}
    for name, layer in plain.items():
        if name not in shapes and (layer.weight.numel() < min_params or held[id(layer.weight)] > 1):
            continue
        in_shape, out_shape = shapes.get(name) or _shapes(layer.in_features, layer.out_features)
        converted = _converted(layer, rank, in_shape, out_shape, format, keep_weights)
        if name in shapes or converted.num_parameters < sum(p.numel() for p in layer.parameters()):
            new[id(layer)] = converted.train(layer.training)
    if not new:
        raise ValueError(
            f"Expected argument `module` to hold linear layers of at least min_params={min_params} weights that get"
            f" smaller, but there is nothing to tensorize in {type(module).__name__} ({len(plain)} linear layers)."
        )
    if id(network) in new:
        return new[id(network)]
    for parent in list(network.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, key, new[id(child)])
    return network


def _converted(
    layer: nn.Linear, rank: int, in_shape: Sequence[int], out_shape: Sequence[int], format: Format, keep: bool
) -> TTLinear:
    with warnings.catch_warnings():
        # one rank for layers of all sizes: lowering it for small ones is what is meant
        warnings.filterwarnings("ignore", message="Argument `rank`")
        if keep:
            return TTLinear.from_dense(layer, rank, in_shape, out_shape, format)
        new = TTLinear(layer.in_features, layer.out_features, in_shape, out_shape, rank, layer.bias is not None, format)
    return new.to(layer.weight.device, layer.weight.dtype)


def _checked_ranks(rank: int | Sequence[int], largest: list[int]) -> list[int]:
    wanted = [rank] * len(largest) if isinstance(rank, int) else list(rank)
    if len(wanted) != len(largest):
        raise ValueError(f"Expected argument `rank` to hold {len(largest)} ranks, one a bond, but got {tuple(wanted)}.")
    if any(each < 1 for each in wanted) or rank == 0:
        raise ValueError(f"Expected argument `rank` to be positive, but got {rank}.")
    if any(each > most for each, most in zip(wanted, largest, strict=True)):
        warnings.warn(
            f"Argument `rank` is {rank}, but the ranks between cores of these shapes are at most {tuple(largest)}:"
            " larger ones are lowered.",
            stacklevel=3,
        )
    return [min(each, most) for each, most in zip(wanted, largest, strict=True)]


def _shapes(in_features: int, out_features: int, modes: int = 4) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Modes of inputs, small ones first, and of outputs, large ones first, so that the products of pairs are alike."""
    pairs = [
        (n, m)
        for n, m in zip(sorted(_modes(in_features, modes)), sorted(_modes(out_features, modes))[::-1], strict=True)
        if n * m > 1
    ] or [(1, 1)]
    return tuple(n for n, _ in pairs), tuple(m for _, m in pairs)


def _modes(features: int, count: int) -> list[int]:
    factors = []
    divisor = 2
    while features > 1:
        while features % divisor == 0:
            factors.append(divisor)
            features //= divisor
        divisor += 1
    modes = [1] * count
    for factor in sorted(factors, reverse=True):
        smallest = modes.index(min(modes))
        modes[smallest] *= factor
    return modes
