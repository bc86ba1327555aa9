"""Named boolean tensors over parameters: True = kept, or may move."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_trust.core.files import pack_bits, read_tensors, unpack_bits, write_tensors
from lightning_trust.core.host import close_names, named_parameters, plain_name

Scope = Literal["global", "layer", "erk"]
_KIND, _VERSION = "lightning_trust.mask", 1


class ParameterMask(Mapping[str, Tensor]):
    """Boolean tensors by parameter name; True = kept, or may move.

    A mapping from plain parameter names (without what ``torch.compile`` inserts) to tensors of the parameters' shapes.

    Args:
        masks: The boolean tensors.

    Raises:
        ValueError: If a tensor is not boolean.

    Example:
        >>> mask = ParameterMask.from_scores({"w": torch.tensor([3.0, 1.0, 2.0, 0.5])}, keep=2)
        >>> mask["w"].tolist(), mask.sparsity
        ([True, False, True, False], 0.5)

    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"Expected mask '{name}' to be boolean, but got {mask.dtype}.")
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"ParameterMask({len(self)} tensors, sparsity={self.sparsity:.4f})"

    # -- counts --------------------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(mask.numel() for mask in self.values())

    @property
    def kept(self) -> int:
        """Number of entries that are True."""
        return sum(int(mask.sum()) for mask in self.values())

    @property
    def density(self) -> float:
        """Share of entries that are True."""
        return self.kept / max(self.size, 1)

    @property
    def sparsity(self) -> float:
        """Share of entries that are False."""
        return 1.0 - self.density

    # -- making --------------------------------------------------------------------------------------------------------
    @staticmethod
    def from_scores(scores: Mapping[str, Tensor], keep: int) -> ParameterMask:
        r"""Keep the ``keep`` entries of highest score over all tensors together.

        Ties are broken by order (of the tensors, then of the flat index), so that exactly ``keep`` entries are True
        and masks of the same scores are nested in ``keep``.

        Args:
            scores: Finite scores by parameter name; read as float32.
            keep: Number of entries to keep, in ``[0, n]``.

        Raises:
            ValueError: If ``keep`` lies outside, or a score is not finite.

        """
        size = sum(score.numel() for score in scores.values())
        if not 0 <= keep <= size:
            raise ValueError(f"Expected argument `keep` to lie in [0, {size}], but got {keep}.")
        for name, score in scores.items():
            if not torch.isfinite(score).all():
                raise ValueError(f"Expected the scores of '{name}' to be finite, but got NaN or infinite values.")
        if keep == 0:
            return ParameterMask({name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()})
        threshold, ties = _kth_largest(list(scores.values()), keep)
        masks = {}
        for name, score in scores.items():
            order = _ordered_bits(score)
            mask = order > threshold
            tied = (order == threshold).flatten()
            found = int(tied.sum())
            if ties and found:
                # the first `ties` of the tied entries fill the count
                chosen = tied.nonzero().flatten()[:ties]
                mask.view(-1)[chosen] = True
                ties -= len(chosen)
            masks[name] = mask
        return ParameterMask(masks)

    @staticmethod
    def with_sparsity(scores: Mapping[str, Tensor], sparsity: float, scope: Scope = "global") -> ParameterMask:
        r"""Prune the share ``sparsity`` of lowest scores.

        * ``"global"``: over all tensors together; ``round(sparsity * n)`` entries go.
        * ``"layer"``: in each tensor by itself.
        * ``"erk"``: densities by Erdős-Rényi-Kernel (Evci et al., Rigging the Lottery, ICML 2020): the density of a
          tensor of shape :math:`(d_1, \dots, d_k)` is proportional to :math:`\sum_i d_i / \prod_i d_i`, at most 1,
          with the share of zeros over all tensors equal to ``sparsity`` up to rounding.

        Args:
            scores: Finite scores by parameter name.
            sparsity: Share of zeros, in ``[0, 1)``.
            scope: Over what the share is taken.

        """
        check_sparsity(sparsity)
        if scope == "global":
            size = sum(score.numel() for score in scores.values())
            return ParameterMask.from_scores(scores, size - round(sparsity * size))
        if scope == "layer":
            pruned = {name: round(sparsity * score.numel()) for name, score in scores.items()}
        elif scope == "erk":
            densities = erk_densities({name: score.shape for name, score in scores.items()}, 1.0 - sparsity)
            pruned = {name: round((1.0 - densities[name]) * score.numel()) for name, score in scores.items()}
        else:
            raise ValueError(f"Expected argument `scope` to be 'global', 'layer' or 'erk', but got {scope!r}.")
        masks: dict[str, Tensor] = {}
        for name, score in scores.items():
            masks.update(ParameterMask.from_scores({name: score}, score.numel() - pruned[name]))
        return ParameterMask(masks)

    def _combined(self, other: ParameterMask, combine: Callable[[Tensor, Tensor], Tensor]) -> ParameterMask:
        masks = {}
        for name in dict.fromkeys((*self, *other)):
            if name in self and name in other:
                masks[name] = combine(self[name], other[name].to(self[name].device))
            else:
                masks[name] = self[name] if name in self else other[name]
        return ParameterMask(masks)

    def union(self, other: ParameterMask) -> ParameterMask:
        """Entries that either mask keeps; a tensor that only one of them names is taken from it."""
        return self._combined(other, torch.logical_or)

    def intersection(self, other: ParameterMask) -> ParameterMask:
        """Entries that both masks keep; a tensor that only one of them names is taken from it."""
        return self._combined(other, torch.logical_and)

    def to(self, device: torch.device | str) -> ParameterMask:
        """The mask on a device."""
        return ParameterMask({name: mask.to(device) for name, mask in self.items()})

    # -- using ---------------------------------------------------------------------------------------------------------
    def check(self, host: nn.Module, what: str = "mask") -> None:
        """Refuse a mask whose names or shapes are not those of the host's parameters.

        Raises:
            ValueError: Listing the names and shapes that do not match.

        """
        parameters = named_parameters(host)
        unknown = [name for name in self if name not in parameters]
        if unknown:
            near = ", ".join(f"'{name}' (close: {close_names(name, parameters, 2)})" for name in unknown[:3])
            raise ValueError(
                f"Expected the {what} to name parameters of {type(host).__name__}, but got {len(unknown)} unknown"
                f" name(s): {near}."
            )
        wrong = [name for name in self if self[name].shape != parameters[name].shape]
        if wrong:
            shapes = ", ".join(
                f"'{name}': {tuple(self[name].shape)} instead of {tuple(parameters[name].shape)}" for name in wrong[:3]
            )
            raise ValueError(
                f"Expected the {what} to have the shapes of the parameters of {type(host).__name__}, but got"
                f" {len(wrong)} other(s): {shapes}."
            )

    def pairs(self, host: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters of a host with their masks, on the parameters' devices."""
        parameters = named_parameters(host)
        return [(parameters[name], mask.to(parameters[name].device)) for name, mask in self.items()]

    # -- keeping -------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Bits and shapes, for a checkpoint: an eighth of a byte an entry."""
        return {name: {"bits": pack_bits(mask).cpu(), "shape": list(mask.shape)} for name, mask in self.items()}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> ParameterMask:
        """The mask that :meth:`state_dict` described."""
        masks = {}
        for name, entry in state.items():
            shape = torch.Size(entry["shape"])
            masks[name] = unpack_bits(entry["bits"].cpu(), shape.numel()).view(shape)
        return ParameterMask(masks)

    def save(self, path: str | Path) -> Path:
        """Write the mask to a safetensors file, bit-packed, aside and renamed."""
        shapes = {f"{name}:shape": torch.tensor(mask.shape, dtype=torch.int64) for name, mask in self.items()}
        bits = {f"{name}:bits": pack_bits(mask) for name, mask in self.items()}
        return write_tensors(path, _KIND, _VERSION, {**bits, **shapes})

    @staticmethod
    def load(path: str | Path) -> ParameterMask:
        """Read a mask file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is truncated, damaged or no mask.

        """
        tensors, _ = read_tensors(path, _KIND, _VERSION)
        masks = {}
        for key in tensors:
            name, field = key.rsplit(":", 1)
            if field != "bits":
                continue
            if f"{name}:shape" not in tensors:
                raise ValueError(f"Expected {path} to hold a shape for '{name}', but got none.")
            shape = torch.Size(tensors[f"{name}:shape"].tolist())
            if tensors[key].numel() != (shape.numel() + 7) // 8:
                raise ValueError(
                    f"Expected {path} to hold {shape.numel()} bits for '{name}' of shape {tuple(shape)},"
                    f" but got {tensors[key].numel()} bytes."
                )
            masks[name] = unpack_bits(tensors[key], shape.numel()).view(shape)
        return ParameterMask(masks)


class WeightZeroing:
    """Keeps pruned weights, and the gradients that would move them, at zero.

    Args:
        mask: Which entries are kept.
        host: Whose parameters they are.

    """

    def __init__(self, mask: ParameterMask, host: nn.Module) -> None:
        pairs = mask.pairs(host)
        self.parameters: list[Tensor] = [parameter for parameter, _ in pairs]
        # in the parameters' type: a product of two floats takes a third of the time of one with a boolean
        self.masks = [kept.to(parameter.dtype) for parameter, kept in pairs]

    @torch.no_grad()
    def weights(self, _optimizer: Any = None) -> None:
        """Zero the pruned weights, in place."""
        _multiply(self.parameters, self.masks)

    @torch.no_grad()
    def gradients(self, _optimizer: Any = None) -> None:
        """Zero the gradients of pruned weights, so that clipping by norm does not count them."""
        entries = [(p.grad, m) for p, m in zip(self.parameters, self.masks, strict=True) if p.grad is not None]
        if entries:
            _multiply([gradient for gradient, _ in entries], [mask for _, mask in entries])


class WeightHolding(WeightZeroing):
    """Holds the weights that a mask does not let move at a reference.

    Weight decay and momentum move them otherwise: an edited gradient alone does not hold a weight.

    Args:
        mask: Which entries may move.
        host: Whose parameters they are.
        reference: Values to hold at, by parameter name; the parameters' present values if None.

    """

    def __init__(self, mask: ParameterMask, host: nn.Module, reference: Mapping[str, Tensor] | None = None) -> None:
        self.names = [name for name, may_move in mask.items() if not bool(may_move.all())]
        super().__init__(ParameterMask({name: mask[name] for name in self.names}), host)
        # the held values take the memory of the parameters, so the mask stays at a byte an entry
        self.masks = [may_move.bool() for may_move in self.masks]
        # zero where a weight may move: a product and a sum put it back in a third of the time of torch.where
        self.held: list[Tensor] = []
        for name, parameter, may_move in zip(self.names, self.parameters, self.masks, strict=True):
            value = parameter.detach() if reference is None else reference[name].to(parameter.device, parameter.dtype)
            self.held.append(value * ~may_move)

    @torch.no_grad()
    def weights(self, _optimizer: Any = None) -> None:
        """Put the held weights back, in place."""
        _multiply(self.parameters, self.masks)
        if self.parameters:
            torch._foreach_add_(self.parameters, self.held)

    def state_dict(self) -> dict[str, Tensor]:
        """The held values alone, flat by name, for a checkpoint."""
        entries = zip(self.names, self.masks, self.held, strict=True)
        return {name: held[~may_move].cpu() for name, may_move, held in entries}

    @staticmethod
    def from_state_dict(mask: ParameterMask, host: nn.Module, state: Mapping[str, Tensor]) -> WeightHolding:
        """Hold at the values that :meth:`state_dict` kept."""
        reference = {}
        for name, held in state.items():
            whole = torch.zeros(mask[name].shape, dtype=held.dtype)
            whole[~mask[name].cpu()] = held.cpu()
            reference[name] = whole
        return WeightHolding(mask, host, reference)


def _multiply(tensors: list[Tensor], masks: list[Tensor]) -> None:
    if tensors:
        torch._foreach_mul_(tensors, masks)


def check_sparsity(sparsity: float) -> None:
    """Refuse a share of zeros outside ``[0, 1)``."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"Expected argument `sparsity` to be a share of zeros in [0, 1), but got {sparsity}.")


def select_parameters(
    host: nn.Module, include: Sequence[str], exclude: Sequence[str] = (), argument: str = "include"
) -> dict[str, nn.Parameter]:
    """Parameters of a host by name globs and layer class names.

    A pattern with a dot, a star or the exact name of a parameter is a glob over plain names (``"net.*.weight"``);
    another word is the class name of a layer (``"Conv2d"``) and stands for the layer's ``weight``.

    Args:
        host: The host.
        include: Patterns; a parameter that one of them matches is taken.
        exclude: Patterns of what is left out after all.
        argument: What an error calls ``include``.

    Raises:
        ValueError: If an ``include`` or ``exclude`` pattern matches nothing, with close names; or if nothing is left.

    """
    parameters = named_parameters(host)
    # a tied parameter answers to all its names and layers
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    every = host.named_parameters(remove_duplicate=False)
    aliases = {plain_name(name): name_of[id(parameter)] for name, parameter in every}
    weights: dict[str, set[str]] = {}
    for module in host.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            weights.setdefault(type(module).__name__, set()).add(name_of[id(weight)])

    def matched(patterns: Iterable[str], which: str) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            hits = {name for alias, name in aliases.items() if fnmatch.fnmatchcase(alias, pattern)}
            hits |= weights.get(pattern, set())
            if not hits:
                known = [*aliases, *weights]
                raise ValueError(
                    f"Expected argument `{which}` to match parameters of {type(host).__name__}, but got '{pattern}',"
                    f" which matches none. Close names: {close_names(pattern, known)}."
                )
            found |= hits
        return found

    left_out = matched(exclude, "exclude")
    chosen = matched(include, argument) - left_out
    if not chosen:
        raise ValueError(
            f"Expected arguments `{argument}` and `exclude` to leave a parameter of {type(host).__name__},"
            f" but got {list(include)} without {list(exclude)}, which leaves none."
        )
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    r"""Density of each tensor by Erdős-Rényi-Kernel (Evci et al., Rigging the Lottery, ICML 2020).

    :math:`\rho_l = \min(1, \varepsilon \sum_i d_i / \prod_i d_i)` with :math:`\varepsilon` such that
    :math:`\sum_l \rho_l n_l = \rho n`.

    Args:
        shapes: Shape of each tensor.
        density: Share of kept entries over all tensors, in ``(0, 1]``.

    Example:
        >>> erk_densities({"a": (10, 10), "b": (100, 100)}, 0.1)
        {'a': 0.918..., 'b': 0.0918...}

    """
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    ratios = {name: sum(shape) / max(sizes[name], 1) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        wanted = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        factor = wanted / max(sum(ratios[name] * sizes[name] for name in rest), 1e-12)
        over = {name for name in rest if factor * ratios[name] > 1.0}
        if not over:
            return {name: 1.0 if name in dense else factor * ratios[name] for name in shapes}
        dense |= over


def _ordered_bits(score: Tensor) -> Tensor:
    """float32 as int32 in the same order, without a sort (sign-magnitude to two's complement)."""
    # + 0.0 makes one of the two zeros
    bits = (score.detach().float() + 0.0).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _kth_largest(scores: list[Tensor], k: int) -> tuple[int, int]:
    """The k-th largest ordered bits over all tensors, and how many entries equal to it belong to the k largest.

    A radix selection in two rounds of 16 bits: the memory it needs is that of one chunk, whatever the tensors' size.
    """
    high, left = _digit(scores, k, lambda bits: (bits >> 16) + 0x8000)
    low, left = _digit(scores, left, lambda bits: bits[(bits >> 16) == high - 0x8000] & 0xFFFF)
    return ((high - 0x8000) << 16) | low, left


def _digit(scores: list[Tensor], k: int, digits: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """The 16-bit digit of the k-th largest, and its rank among the entries with that digit."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for score in scores:
        for chunk in torch.split(score.detach().flatten(), 1 << 20):
            counts += torch.bincount(digits(_ordered_bits(chunk)), minlength=1 << 16).cpu()
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, k))
    digit = (1 << 16) - 1 - place
    return digit, k - int(above[place] - counts[digit])
