"""Two gloo ranks in forked processes: for pure functions, and for whole runs of a Trainer.

The parent must have run no threaded torch operation (tests/conftest.py sets one thread), for a fork would hang.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.multiprocessing
from lightning.pytorch.callbacks import Callback

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def run_on_two_ranks(folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` on two ranks of one process group.

    Args:
        folder: An empty folder; the ranks meet, and leave their results, there.
        function: May be a local function; its result must survive ``torch.save``.
        args: Further arguments.

    Returns:
        The results of rank 0 and rank 1. An exception in a rank is raised here, with its traceback as text.

    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(_rank, (folder, function, args), nprocs=2, start_method="fork")
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(2)]


def _rank(rank: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # ranks whose global generators differ, as they do in real runs
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        # a rank that is done before the other has met it would look like one that crashed
        dist.barrier()
        torch.save(function(rank, *args), folder / f"result{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


class GeneratorsDiffer(Callback):
    """Seeds the global generators by rank, and draws more often on rank 1, as any other callback may."""

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(trainer.global_rank)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(1 + trainer.global_rank)


class _AtTheEnd(Callback):
    def __init__(self, folder: Path, function: Callable[[pl.Trainer, pl.LightningModule], Any]) -> None:
        self.folder = folder
        self.function = function

    def on_train_end(self, trainer, pl_module):
        torch.save(self.function(trainer, pl_module), self.folder / f"result{trainer.global_rank}.pt")


def fit_on_two_ranks(
    folder: Path,
    host: pl.LightningModule,
    data: Any,
    callbacks: list[Callback],
    result: Callable[[pl.Trainer, pl.LightningModule], Any] | None = None,
    **settings: Any,
) -> list[Any]:
    """Fit a host on two ranks whose global generators differ.

    Args:
        folder: An empty folder for the results.
        host: The host.
        data: Its training data loader or data module; bring a ``DistributedSampler`` of your own, made in a data module
            or by ``train_dataloader``, where the order matters.
        callbacks: The callbacks.
        result: What to bring out of each rank at the end of training; the host's state dict by default.
        settings: More arguments of the Trainer.

    Returns:
        The results of rank 0 and rank 1. An assertion that fails in a rank is raised here.

    """
    folder.mkdir(parents=True, exist_ok=True)
    last = _AtTheEnd(folder, result or (lambda _, module: module.state_dict()))
    trainer = pl.Trainer(
        devices=2,
        strategy="ddp_fork",
        callbacks=[GeneratorsDiffer(), *callbacks, last],
        default_root_dir=folder,
        **{**QUIET, **settings},
    )
    fit = functools.partial(trainer.fit, host)
    if isinstance(data, pl.LightningDataModule):
        fit(datamodule=data)
    else:
        fit(data)
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(2)]


def assert_equal_states(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float) -> None:
    """Two state dicts have the same names and equal tensors; ``rtol`` and ``atol`` loosen it."""
    assert list(first) == list(second)
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0.0, "atol": 0.0}), msg=name)
