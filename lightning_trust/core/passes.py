"""Passes over data that update nothing: scores, counts, BatchNorm statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import sum_over_ranks_
from lightning_trust.core.modes import eval_mode
from lightning_trust.core.randomness import untouched_random_state
from lightning_trust.core.step import Attachment


@contextmanager
def timed_pass(host: nn.Module) -> Iterator[None]:
    """Add the seconds spent inside to what the run's passes have taken (``Attachment.pass_seconds``)."""
    attachment = Attachment.on(host)
    start = time.perf_counter()
    try:
        yield
    finally:
        if attachment is not None:
            attachment.pass_seconds += time.perf_counter() - start


def transferred(trainer: Any, host: Any, loader: Iterable[Any]) -> Generator[Any, None, None]:
    """Batches of a loader as the host's steps get them: through its transfer hooks, in its precision, on its device.

    Hooks that augment while ``trainer.training`` find the Trainer validating.
    """
    for batch in loader:
        stage = trainer.state.stage
        if trainer.training:
            trainer.state.stage = RunningStage.VALIDATING
        try:
            moved = trainer.precision_plugin.convert_input(batch)
            moved = host._on_before_batch_transfer(moved, dataloader_idx=0)
            # the host's own device: after the end of a fit it may no longer be the strategy's
            moved = trainer.strategy.batch_to_device(moved, device=host.device, dataloader_idx=0)
        finally:
            trainer.state.stage = stage
        yield moved


def evaluate(
    trainer: Any, host: Any, network: nn.Module, loader: Iterable[Any], spec: BatchSpec
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Outputs and targets of every batch of a loader, without a graph, in eval mode.

    Random state and modes are put back after the last batch.

    Args:
        trainer: The Trainer.
        host: The host, whose transfer hooks move the batches.
        network: What maps inputs to outputs.
        loader: The data; its shard of them on this rank.
        spec: Where inputs and targets sit.

    Yields:
        Outputs as float32 where they are floating, and targets.

    """
    with untouched_random_state(), eval_mode(host), eval_mode(network):
        for batch in transferred(trainer, host, loader):
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                outputs = network(spec.inputs_of(batch))
            floating = isinstance(outputs, Tensor) and outputs.is_floating_point()
            yield outputs.float() if floating else outputs, spec.targets_of(batch)


def gradient_sum(
    trainer: Any,
    host: Any,
    network: nn.Module,
    loader: Iterable[Any],
    loss: Callable[[Tensor, Tensor], Tensor],
    parameters: Mapping[str, nn.Parameter],
    spec: BatchSpec,
) -> dict[str, Tensor]:
    r"""Signed sum of the gradients of the samples' losses, in eval mode, over all ranks.

    .. math:: g = \sum_i \nabla_\theta \ell(f(x_i; \theta), y_i)

    Every batch counts with its size, so that neither the batch size nor the number of ranks changes the sum. Nothing
    is left in ``.grad``.

    Args:
        trainer: The Trainer.
        host: The host.
        network: What maps inputs to outputs.
        loader: The data; its shard of them on this rank.
        loss: Mean loss of a batch from outputs and targets.
        parameters: Parameters by name; one that gets no gradient, or takes none, sums to zero.
        spec: Where inputs and targets sit.

    Returns:
        Float32 tensors by name.

    """
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    taking = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    with timed_pass(host), untouched_random_state(), eval_mode(host), eval_mode(network):
        for batch in transferred(trainer, host, loader):
            with torch.inference_mode(False), torch.enable_grad():
                targets = spec.targets_of(batch)
                with trainer.precision_plugin.train_step_context():
                    value = loss(network(spec.inputs_of(batch)), targets)
                if not value.requires_grad:
                    continue
                gradients = torch.autograd.grad(value * len(targets), list(taking.values()), allow_unused=True)
            for name, gradient in zip(taking, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient
            del gradients
        sum_over_ranks_(list(sums.values()))
    return sums


@torch.no_grad()
def reestimate_batchnorm(trainer: Any, host: Any, network: nn.Module, loader: Iterable[Any], spec: BatchSpec) -> None:
    """Compute BatchNorm's running statistics anew from data: averages over the batches of all ranks by their rows.

    A layer that no batch reaches keeps what it has.

    Args:
        trainer: The Trainer.
        host: The host, whose transfer hooks move the batches.
        network: The network whose layers are re-estimated; nothing else of it changes.
        loader: The data; its shard of them on this rank.
        spec: Where inputs sit.

    """
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    found = [[buffer.clone() for buffer in layer.buffers(recurse=False)] for layer in layers]
    seen = 0
    with timed_pass(host), untouched_random_state(), eval_mode(host), eval_mode(network):
        for layer in layers:
            layer.reset_running_stats()
            layer.training = True
        try:
            for batch in transferred(trainer, host, loader):
                inputs = spec.inputs_of(batch)
                seen += len(inputs)
                for layer in layers:
                    # a batch counts with its rows
                    layer.momentum = len(inputs) / seen
                with trainer.precision_plugin.forward_context():
                    network(inputs)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        for layer, before in zip(layers, found, strict=True):
            count = layer.get_buffer("num_batches_tracked")
            # a rank counts with its rows, where the layer has seen any
            rows = torch.full_like(count, seen if int(count) else 0)
            sums = [layer.get_buffer("running_mean") * rows, layer.get_buffer("running_var") * rows, rows, count]
            sum_over_ranks_(sums)
            if int(count) == 0:
                for buffer, value in zip(layer.buffers(recurse=False), before, strict=True):
                    buffer.copy_(value)
                continue
            for name, total in zip(("running_mean", "running_var"), sums, strict=False):
                layer.get_buffer(name).copy_(total / rows)
