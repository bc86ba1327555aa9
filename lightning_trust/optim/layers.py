"""What optimizers with a learning rate per layer share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def check_range(name: str, value: float, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse a number that is not finite or not in ``[low, high)``.

    Raises:
        ValueError: Naming the argument, the range and the value.

    """
    if not (math.isfinite(value) and low <= value < high):
        raise ValueError(f"Expected argument `{name}` to be a number in [{low:g}, {high:g}), but got {value}.")


def check_dense(optimizer: Optimizer) -> None:
    """Refuse sparse gradients, before the first weight is moved.

    Raises:
        ValueError: If a parameter has one.

    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise ValueError(
                    f"{type(optimizer).__name__} needs dense gradients, for it takes the norm of a layer, but a"
                    f" parameter of shape {tuple(parameter.shape)} has a sparse one. Use `Embedding(sparse=False)`, or"
                    " torch.optim.SparseAdam for these parameters."
                )


class LayerwiseOptimizer(Optimizer):
    """Base of optimizers with a learning rate per layer; a subclass moves the parameters of a group that have one."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights.

        Args:
            closure: Evaluates the loss and its gradient.

        Returns:
            What the closure returned.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_dense(self)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._move(group, parameters)
        return loss

    def _move(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        raise NotImplementedError


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norms, one a tensor, as a vector on the device of the first, of float32 or wider."""
    each = torch._foreach_norm(tensors)
    wide = torch.promote_types(each[0].dtype, torch.float32)
    return torch.stack([norm.to(each[0].device, wide) for norm in each])


def scaled_by(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its factor, in place and without asking the device for a value."""
    each = [factor.to(tensor.device, tensor.dtype) for tensor, factor in zip(tensors, factors.unbind(), strict=True)]
    torch._foreach_mul_(tensors, each)
