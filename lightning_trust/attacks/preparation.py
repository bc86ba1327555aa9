"""What an attack needs around it: modes of the network, gradients of parameters, radii and logits that can be meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_trust.core.modes import eval_mode, frozen_parameters, untouched_batchnorm
from lightning_trust.core.space import InputSpace

Model = Callable[[Tensor], Tensor]


def check_radius(eps: float, space: InputSpace) -> None:
    """Refuse an l-infinity radius that cannot be meant in the units of a space.

    Raises:
        ValueError: If the radius is larger than the box.

    """
    width = space.high - space.low
    if eps > width:
        hint = f" Did you mean {eps:g}/255?" if width <= 2.0 and eps <= 255.0 else ""
        raise ValueError(
            f"Expected argument `eps` to be in the units of the inputs, in [0, {width:g}], but got {eps:g}.{hint} For"
            " data in another range pass `space=InputSpace(low, high)`."
        )


def owner_of(model: Model) -> nn.Module | None:
    """The module behind a callable, whose modes and parameters an attack must mind; None for a plain function."""
    if isinstance(model, nn.Module):
        return model
    owner = getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def attack_mode(model: Model, batch_norm: Literal["eval", "batch"] = "eval") -> Iterator[None]:
    """Set the modes of a model for an attack, and give them back.

    Args:
        model: The model.
        batch_norm: Whether BatchNorm uses its running statistics (``"eval"``) or those of the batch (``"batch"``).

    """
    module = owner_of(model)
    if module is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(eval_mode(module))
        if batch_norm == "batch":
            for layer in module.modules():
                if isinstance(layer, _NormBase):
                    layer.training = True
            stack.enter_context(untouched_batchnorm(module))
        yield


@contextmanager
def prepared(model: Model, batch_norm: Literal["eval", "batch"] = "eval") -> Iterator[None]:
    """:func:`attack_mode` without gradients of parameters: neither computed nor prepared for in the forward pass."""
    module = owner_of(model)
    with attack_mode(model, batch_norm), frozen_parameters([] if module is None else module.parameters()):
        yield


def check_logits(outputs: Any, targets: Tensor, owner: str, name: str = "targets") -> None:
    """Refuse what a network puts out if it is no batch of logits, or has too few of them for the targets.

    Raises:
        ValueError: Naming the shape.

    """
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"Expected the network that {owner} attacks to put out logits of shape (N, K), but got {found}."
        )
    if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < outputs.shape[1]):
        raise ValueError(
            f"Expected argument `{name}` of {owner} to hold classes in [0, {outputs.shape[1]}), the number of logits,"
            f" but got classes from {int(targets.min())} to {int(targets.max())}."
        )


def check_counts(**counts: int | None) -> None:
    """Raise ValueError where a number of steps, restarts or the like, given by its name, is below 1; None is none."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"Expected argument `{name}` to be at least 1, but got {count}.")


def check_positive(**values: float | None) -> None:
    """Raise ValueError where a number, given by its name, is not above 0; None is none."""
    for name, value in values.items():
        if value is not None and not value > 0.0:
            raise ValueError(f"Expected argument `{name}` to be positive, but got {value}.")


def check_shares(**shares: float) -> None:
    """Raise ValueError where a number, given by its name, is not in ``(0, 1]``."""
    for name, share in shares.items():
        if not 0.0 < share <= 1.0:
            raise ValueError(f"Expected argument `{name}` to be in (0, 1], but got {share}.")
