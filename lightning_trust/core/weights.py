"""Evaluating a host at other weights, and giving it back its own bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightSwap:
    """Puts other values into parameters, and the kept ones back by copy.

    The copies are made once and kept for later swaps. What was moved in the forward pass must stay where it is until
    after the backward pass, so a callback swaps before the one and restores after the other.

    Args:
        parameters: The parameters by name; they stay the same objects.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> swap = WeightSwap({"weight": weight})
        >>> swap.add({"weight": torch.tensor([0.1, 0.2])})
        >>> weight.data
        tensor([1.1000, 1.2000])
        >>> swap.restore()
        >>> weight.data
        tensor([1., 1.])

    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self._kept: dict[str, Tensor] = {}
        self._moved: list[str] = []

    @property
    def moved(self) -> bool:
        """Whether parameters are away from their own values."""
        return bool(self._moved)

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Put values into some of the parameters."""
        for name, value in values.items():
            self._keep(name)
            self.parameters[name].copy_(value)

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add values to some of the parameters."""
        for name, value in values.items():
            self._keep(name)
            self.parameters[name].add_(value)

    @torch.no_grad()
    def restore(self) -> None:
        """Give every parameter that was moved its own value back."""
        for name in self._moved:
            self.parameters[name].copy_(self._kept[name])
        self._moved = []

    def _keep(self, name: str) -> None:
        if name in self._moved:
            return
        parameter = self.parameters[name]
        kept = self._kept.get(name)
        if kept is None or kept.shape != parameter.shape or kept.device != parameter.device:
            self._kept[name] = parameter.detach().clone()
        else:
            kept.copy_(parameter)
        self._moved.append(name)


@contextmanager
def substituted(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module compute with other tensors in the place of some parameters; the parameters stay untouched.

    The tensors may be batched by ``torch.func.vmap`` or carry forward derivatives, which no parameter can take on.

    Args:
        module: The module.
        values: Tensors by the names of the parameters, as ``named_parameters`` has them; a tied parameter is replaced
            at all its places.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with substituted(layer, {"weight": torch.tensor([[3.0]])}):
        ...     layer(torch.ones(1, 1))
        tensor([[3.]])

    """
    parameters = dict(module.named_parameters())
    wanted = {id(parameters[name]): value for name, value in values.items()}
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and id(parameter) in wanted
    ]
    try:
        for owner, name, parameter in places:
            # not through `setattr`: that takes parameters only
            owner._parameters[name] = wanted[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluate at other weights inside, forward and backward pass included.

    Args:
        parameters: The parameters by name.
        values: What some of them are inside.

    """
    swap = WeightSwap(parameters)
    try:
        swap.set(values)
        yield
    finally:
        swap.restore()
