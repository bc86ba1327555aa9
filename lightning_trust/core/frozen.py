"""Frozen copies of a network: outside the optimizer, DDP and the checkpoint of the host."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn


class FrozenCopy:
    """A network as it is now, in eval mode and without gradients: a teacher, a reference.

    It is no ``nn.Module`` on purpose: held by a callback or a host, it does not become a sub-module, so no optimizer,
    no DDP wrapper and no state dict finds it.

    Args:
        network: The network to copy.

    Example:
        >>> frozen = FrozenCopy(nn.Linear(2, 1))
        >>> frozen(torch.ones(3, 2)).requires_grad
        False

    """

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        for parameter in self.network.parameters():
            parameter.grad = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs without a graph; on the device of the first tensor argument."""
        device = next((arg.device for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
        held = next(itertools.chain(self.network.parameters(), self.network.buffers()), None)
        if device is not None and held is not None and held.device != device:
            self.to(device)
        with torch.no_grad():
            return self.network(*args, **kwargs)

    def to(self, device: torch.device | str) -> FrozenCopy:
        """Move the copy to a device."""
        self.network.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The copy's weights, for the state of a callback."""
        return self.network.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Give the copy the weights of a checkpoint."""
        self.network.load_state_dict(state)
