"""Classification of images in the small experiment of tensor-compressed training; see benchmarks/tensor_bp_free.py.

10,000 images of Fashion-MNIST, 784-256-10 without biases, in tensor-train form of rank 4: 1,504 weights against
203,264. Trainings from losses alone have the same number of losses, and those with back-propagation as many steps as
the one of them that has the most. Learning rates and lengths of differences are the best of a few with another seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from benchmarks.silent_trainer import SILENT
from lightning_trust.callbacks import ZerothOrderGradient
from lightning_trust.core.schedules import Cosine
from lightning_trust.datamodules import FashionMNIST
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import tensorize
from lightning_trust.optim import HybridZO

SCENARIO = "Fashion-MNIST, 10,000 images"
#: shapes of the paper's network for MNIST
SHAPES = {"1": ((4, 7, 7, 4), (4, 4, 4, 4)), "4": ((4, 4, 4, 4), (1, 5, 2, 1))}
QUIET = SILENT | {"num_sanity_val_steps": 0}
BATCH, STEPS_PER_EPOCH = 100, 100
Q = 10
DROPOUT = 0.9
#: losses of a step on coordinates, on average
COORDINATES = round(2 * 1504 * (1.0 - DROPOUT)) + 1


def dense() -> nn.Module:
    """The network of the paper's MNIST experiment."""
    layers = [nn.Linear(784, 256, bias=False), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10, bias=False)]
    return nn.Sequential(nn.Flatten(), *layers)


def tensor_train() -> nn.Module:
    """The same in tensor-train form."""
    return tensorize(dense(), rank=4, shapes=SHAPES)


@dataclass(frozen=True)
class ImageRun:
    """One run: its network, optimizer and steps, and over how many epochs the learning rate falls to a twentieth."""

    network: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    steps: int
    epochs: float
    from_losses: bool = True


def image_runs(losses: int = 60_000) -> dict[str, ImageRun]:
    """Name in the table -> run, for a number of losses."""
    most = losses // (2 * Q)
    small = partial(HybridZO, lr=1e-2, mu=0.01, q=Q, coordinate_dropout=DROPOUT)
    # random estimates for half of the losses
    first = max(1, most // 2 // STEPS_PER_EPOCH)
    rest = (losses - first * STEPS_PER_EPOCH * 2 * Q) // COORDINATES
    alone = losses // COORDINATES

    def at_epoch(epoch: int, rate: float) -> Callable[..., torch.optim.Optimizer]:
        return partial(small, switch="epoch", switch_epoch=epoch, coordinate_lr=rate)

    large = partial(HybridZO, lr=1e-3, mu=1e-3, q=Q, patience=None)
    epochs = most / STEPS_PER_EPOCH
    return {
        "dense, back-propagation": ImageRun(dense, partial(torch.optim.Adam, lr=1e-3), most, epochs, False),
        "tensor train, back-propagation": ImageRun(
            tensor_train, partial(torch.optim.Adam, lr=1e-2), most, epochs, False
        ),
        # its second phase is at the end of the fall
        "tensor train, HybridZO": ImageRun(
            tensor_train, at_epoch(first, 20 * 0.03), first * STEPS_PER_EPOCH + rest, first
        ),
        "tensor train, RGE": ImageRun(tensor_train, partial(small, patience=None), most, epochs),
        "tensor train, CGE": ImageRun(tensor_train, at_epoch(0, 0.3), alone, alone / STEPS_PER_EPOCH),
        "dense, RGE": ImageRun(dense, large, most, epochs),
    }


def measured_images(
    run: ImageRun, seed: int, train_rows: int = BATCH * STEPS_PER_EPOCH, test_rows: int | None = None
) -> dict[str, Any]:
    """Train and test one run."""
    pl.seed_everything(seed, verbose=False)
    module = ImageClassifier(run.network(), optimizer=run.optimizer, schedule=Cosine(1.0, 0.05, run.epochs))
    data = FashionMNIST("data", BATCH, train_rows=train_rows, val_rows=0, test_rows=test_rows, normalise=True)
    source = ZerothOrderGradient()
    callbacks: list[pl.Callback] = [source] if run.from_losses else []
    trainer = pl.Trainer(**QUIET, max_steps=run.steps, max_epochs=run.steps, callbacks=callbacks)
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    (result,) = pl.Trainer(**QUIET).test(module, datamodule=data, verbose=False)
    return {
        "accuracy": result["test/acc"],
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "steps": run.steps,
        "losses": source.queries if run.from_losses else run.steps,
        "seconds": seconds,
    }
