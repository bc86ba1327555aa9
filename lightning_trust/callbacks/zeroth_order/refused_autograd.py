"""A training step that may not ask for derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException


@contextmanager
def refused_autograd(owner: str) -> Iterator[None]:
    """Refuse ``Tensor.backward``, ``torch.autograd.backward`` and ``torch.autograd.grad`` inside.

    Args:
        owner: What may not call them, for the message.

    Raises:
        MisconfigurationException: Where one is called.

    Example:
        >>> with refused_autograd("MyModel.training_step"):
        ...     torch.ones(1, requires_grad=True).sum().backward()
        Traceback (most recent call last):
            ...
        lightning.fabric.utilities.exceptions.MisconfigurationException: ZerothOrderGradient trains without ...

    """

    def refusal(name: str) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise MisconfigurationException(
                f"ZerothOrderGradient trains without back-propagation, from values of the loss alone, but {owner} calls"
                f" {name}. Return the loss and leave its gradient to the estimate; derivatives in the inputs come from"
                " values as well, by SparseGridDerivatives, SteinDerivatives or FiniteDifference. Or train without"
                " ZerothOrderGradient."
            )

        return refuse

    kept = {name: getattr(torch.autograd, name) for name in ("backward", "grad")}
    try:
        # under `no_grad` they would fail in words that name no reason, under `enable_grad` they would work unseen
        for name in kept:
            setattr(torch.autograd, name, refusal("`.backward()`" if name == "backward" else "`torch.autograd.grad`"))
        yield
    finally:
        for name, function in kept.items():
            setattr(torch.autograd, name, function)
