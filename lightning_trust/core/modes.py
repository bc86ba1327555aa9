"""Context managers that change how a network behaves and restore exactly what they found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


@contextmanager
def eval_mode(module: nn.Module, only: type[nn.Module] | tuple[type[nn.Module], ...] | None = None) -> Iterator[None]:
    """Put a network, or its layers of some types, in eval mode; each sub-module gets back the mode it had.

    Args:
        module: The network.
        only: Layer types to put in eval mode; all sub-modules if None.

    """
    found = [(layer, layer.training) for layer in module.modules() if only is None or isinstance(layer, only)]
    try:
        for layer, _ in found:
            layer.training = False
        yield
    finally:
        for layer, training in found:
            layer.training = training


@contextmanager
def frozen_parameters(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Take ``requires_grad`` from parameters; each gets back the flag it had."""
    found = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in found:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in found:
            parameter.requires_grad_(requires_grad)


@contextmanager
def untouched_batchnorm(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm (and InstanceNorm) layers compute as they would, and give their running statistics back.

    Forward passes inside normalise with the mean and variance of the batch where the layer trains, but leave no trace
    in ``running_mean``, ``running_var`` and ``num_batches_tracked``.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.training]
    found = [[(buffer, buffer.clone()) for buffer in layer.buffers(recurse=False)] for layer in layers]
    try:
        yield
    finally:
        for buffers in found:
            for buffer, value in buffers:
                # `.data`: a graph made inside has saved the buffer, but computes from the statistics of its batch
                buffer.data.copy_(value)


@contextmanager
def unused_running_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers that train neither read nor write their running statistics.

    They normalise with the mean and variance of the batch, as they do anyway. What is batched by ``torch.func.vmap``,
    or carries forward derivatives, cannot be written to a buffer.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training]
    found = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracked in zip(layers, found, strict=True):
            layer.track_running_stats = tracked
