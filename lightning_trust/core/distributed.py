"""One value, one decision, one set of rows for all ranks; and which strategies are supported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


def check_strategy(owner: str, trainer: Any, supported: Sequence[str] = SUPPORTED_STRATEGIES) -> None:
    """Refuse a strategy that was not tested, before the first step.

    Args:
        owner: Name of the class that asks, for the message.
        trainer: The Trainer.
        supported: Class names of strategies that are tested; subclasses (DeepSpeed is one of DDP's) are not.

    Raises:
        MisconfigurationException: If the Trainer's strategy is another one.

    """
    # by name, so that a Trainer of the `pytorch_lightning` package is understood as well
    found = type(trainer.strategy).__name__
    if found not in supported:
        names = " or ".join(name.removesuffix("Strategy") for name in supported)
        raise MisconfigurationException(
            f"{owner} supports the strategies {names}, but got {found}."
            " Use `Trainer(strategy='auto')` on one device or `strategy='ddp'` on several."
        )


def world_size() -> int:
    """Number of ranks in the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank in the default process group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sum_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in place; nothing happens on one rank."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over the ranks, as a new tensor."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def from_first_rank(value: Any) -> Any:
    """The value of rank 0, on every rank. One decision for all: call it on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: Any) -> list[Any]:
    """The values of all ranks in their order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor, interleaved: bool = True) -> Tensor:
    """Rows of all ranks as one tensor, on every rank; the ranks may hold different numbers of rows.

    Args:
        rows: Shape ``(n_rank, ...)``.
        interleaved: Whether rank ``r`` of ``W`` holds the rows ``r::W`` of the whole (the order of a shard that was
            taken with a stride), which are then put back in their places; else the ranks' rows follow one another.

    """
    parts: list[Tensor] = [part.to(rows.device) for part in from_all_ranks(rows.detach().cpu())]
    whole = torch.cat(parts)
    if interleaved and len(parts) > 1:
        order = torch.cat([torch.arange(len(part)) * len(parts) + r for r, part in enumerate(parts)])
        whole = whole[order.argsort().to(rows.device)]
    return whole
