"""An optimizer of a method's own: for a router, an adversary, scores or multipliers that the host does not train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_trust.core.distributed import sum_over_ranks_, world_size


class AuxiliaryOptimizer:
    """Steps parameters that the host's optimizers must leave alone.

    Gradients are computed by themselves, averaged over the ranks, and gone after the step: no ``.grad`` of the host is
    touched, DDP is not involved, and Trainer's ``global_step`` does not count it. Between the steps the parameters may
    have ``requires_grad=False``; that is how they are kept from DDP, which would wait for their gradients, and from the
    host's optimizers, which step over parameters without one: neither weight decay nor momentum moves them.

    Step it in ``on_train_batch_end``, on all ranks, and keep :meth:`state_dict` in the state of the callback; the
    parameters themselves are in the checkpoint of whoever holds them.

    Args:
        parameters: The parameters, at least one.
        create: Makes the optimizer of a list of parameters.

    Raises:
        ValueError: If there are no parameters.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]), requires_grad=False)
        >>> auxiliary = AuxiliaryOptimizer([weight], lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        >>> with auxiliary.training():
        ...     auxiliary.step((3.0 * weight).sum())
        >>> weight.data, weight.requires_grad, weight.grad
        (tensor([0.7000]), False, None)

    """

    def __init__(self, parameters: Sequence[Tensor], create: Callable[[list[Tensor]], Optimizer]) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("Expected argument `parameters` to hold at least one parameter, but got none.")
        self.optimizer = create(self.parameters)
        self._base = [float(group["lr"]) for group in self.optimizer.param_groups]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Let the parameters take gradients inside: the forward pass and the step belong here."""
        found = [parameter.requires_grad for parameter in self.parameters]
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, requires_grad in zip(self.parameters, found, strict=True):
                parameter.requires_grad_(requires_grad)

    def scale_lr(self, factor: float) -> None:
        """Set the learning rates to ``factor`` times those that the optimizer was made with."""
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor

    def step(self, loss: Tensor) -> None:
        """Take a step along the gradient of a loss: the mean over the ranks of what each has.

        Parameters that the loss does not depend on get a gradient of zero, as they would on a rank where it does.
        """
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        # a copy: autograd may return an expanded tensor, or the same one twice
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient.clone(memory_format=torch.contiguous_format)
            for parameter, gradient in zip(self.parameters, found, strict=True)
        ]
        sum_over_ranks_(gradients)
        held = [parameter.grad for parameter in self.parameters]
        try:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient.div_(world_size())
            self.optimizer.step()
        finally:
            for parameter, before in zip(self.parameters, held, strict=True):
                parameter.grad = before

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, for the state of a callback."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.optimizer.load_state_dict(state)
