"""A point of a curve of networks: its position, and the BatchNorm statistics that belong to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_trust.nn.adversarial.curve import CurveNetwork


@contextmanager
def point_of(curve: CurveNetwork, t: float, statistics: list[Tensor]) -> Iterator[None]:
    """Have a curve at a position with BatchNorm statistics of its own, and give back what it had."""
    position, buffers = float(curve.t), statistics_of(curve)
    found = [buffer.clone() for buffer in buffers]
    try:
        curve.move_to(t)
        _copy(buffers, statistics)
        yield
    finally:
        curve.move_to(position)
        _copy(buffers, found)


@torch.no_grad()
def _copy(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def statistics_of(curve: CurveNetwork) -> list[Tensor]:
    """The buffers of BatchNorm's running statistics, which exist once for all points."""
    layers = [layer for layer in curve.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


def check_statistics(curve: CurveNetwork) -> None:
    """Refuse layers whose running statistics nobody re-estimates.

    Raises:
        ValueError: Naming the layers.

    """
    stuck = [
        name
        for name, layer in curve.named_modules()
        if isinstance(layer, _NormBase) and layer.track_running_stats and not isinstance(layer, _BatchNorm)
    ]
    if stuck:
        raise ValueError(
            "Expected running statistics of BatchNorm only, which are re-estimated at each point of the curve, but got"
            f" {', '.join(stuck[:4])}. Set track_running_stats=False."
        )
