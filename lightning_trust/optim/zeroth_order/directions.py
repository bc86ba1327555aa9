"""Random directions over all parameters that are drawn again from their seed rather than kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from lightning_trust.functional.zeroth_order import Distribution, draw_direction_
from lightning_trust.optim.zeroth_order.estimator import gradient_of


class SeededDirections:
    """Directions that seeds stand for: drawn tensor by tensor in the memory of the largest one.

    Args:
        parameters: The parameters by name, on one device.
        distribution: What an entry is drawn from; ``"sphere"`` is the unit sphere over all parameters together.
        masks: By the names of parameters, which entries a direction has (True); the others are 0.
        per_tensor: Whether the part of a direction in each parameter has the length 1.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> directions = SeededDirections({"weight": weight}, "rademacher")
        >>> directions.move(seed=1, by=0.5)
        >>> weight.data.abs()
        tensor([0.5000, 0.5000])
        >>> directions.move(seed=1, by=-0.5)
        >>> weight.data
        tensor([0., 0.])

    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        distribution: Distribution = "normal",
        masks: Mapping[str, Tensor] | None = None,
        per_tensor: bool = False,
    ) -> None:
        self.distribution = distribution
        self.per_tensor = per_tensor
        # `.data`: weights that require a gradient are moved in place
        self.entries = [(name, parameter, (masks or {}).get(name)) for name, parameter in parameters.items()]
        first = self.entries[0][1]
        self._generator = Generator(first.device)
        self._buffers: dict[torch.dtype, Tensor] = {}
        sizes: dict[torch.dtype, int] = {}
        for _, parameter, _ in self.entries:
            kind = _drawn(parameter)
            sizes[kind] = max(sizes.get(kind, 0), parameter.numel())
        self._sizes = sizes

    def _draws(self, seed: int) -> list[tuple[str, Tensor, Tensor | None]]:
        self._generator.manual_seed(seed)
        for kind, size in self._sizes.items():
            if kind not in self._buffers:
                self._buffers[kind] = torch.empty(size, dtype=kind, device=self._generator.device)
        return self.entries

    def _next(self, parameter: Tensor, mask: Tensor | None) -> Tensor:
        buffer = self._buffers[_drawn(parameter)][: parameter.numel()].view(parameter.shape)
        draw_direction_(buffer, self.distribution, self._generator)
        if mask is not None:
            buffer.mul_(mask)
        if self.per_tensor:
            # one without an active entry stays 0
            buffer.div_(torch.linalg.vector_norm(buffer).clamp_min(torch.finfo(buffer.dtype).tiny))
        return buffer

    @torch.no_grad()
    def length(self, seed: int) -> float:
        """Euclidean length of the direction as it is drawn; 1 unless it is scaled by it."""
        if self.distribution != "sphere":
            return 1.0
        square = 0.0
        for _, parameter, mask in self._draws(seed):
            square += float(self._next(parameter, mask).double().square().sum())
        return max(square, 1e-300) ** 0.5

    @torch.no_grad()
    def move(self, seed: int, by: float | Mapping[str, float], shrink: Mapping[str, float] | None = None) -> None:
        """Add ``by`` times the direction to the weights, which are multiplied by ``shrink`` before.

        Args:
            seed: The direction.
            by: How far, in multiples of the direction as it is drawn: one number, or one for each parameter's name.
            shrink: Factors of the weights, for the parameters that have one other than 1.

        """
        for name, parameter, mask in self._draws(seed):
            direction = self._next(parameter, mask)
            if shrink and shrink.get(name, 1.0) != 1.0:
                parameter.data.mul_(shrink[name])
            parameter.data.add_(direction, alpha=by[name] if isinstance(by, Mapping) else by)

    @torch.no_grad()
    def add_to_gradients(self, seed: int, factor: float) -> None:
        """Add ``factor`` times the direction to the parameters' ``.grad``."""
        for _, parameter, mask in self._draws(seed):
            gradient_of(parameter).add_(self._next(parameter, mask), alpha=factor)

    def release(self) -> None:
        """Give back the memory in which directions are drawn."""
        self._buffers.clear()


def _drawn(parameter: Tensor) -> torch.dtype:
    # half precision has too few normal numbers
    return parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32
