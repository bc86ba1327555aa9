"""What the prompting experiments share: source networks that know garments by rotation, the digits, their rivals."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from benchmarks.silent_trainer import SILENT
from lightning_trust.callbacks import IterativeLabelMapping
from lightning_trust.core.wrapping import surrounding
from lightning_trust.datamodules import Digits, FashionMNIST, RotatedFashionMNIST
from lightning_trust.functional.prompting import frequency_label_mapping, mapping_precision
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import SmallCNN, VisualPrompt

QUIET = SILENT | {"devices": 1}
#: pixels of a digit, and of the canvas in whose middle it lies
IMAGE, CANVAS = 16, 28


@dataclass(frozen=True)
class Budget:
    """How long everything goes on; smaller to see that it runs."""

    source_rows: int = 20_000
    source_epochs: int = 6
    epochs: int = 15
    train_rows: int | None = None
    test_rows: int | None = None


SMOKE = Budget(source_rows=200, source_epochs=1, epochs=1, train_rows=64, test_rows=40)


def source_network(seed: int, folder: Path, budget: Budget, widths: Sequence[int] = (16, 32, 32, 64)) -> SmallCNN:
    """A network trained on garments by rotation, 40 classes; the same file is read the next time."""
    path = folder / f"source-{'x'.join(map(str, widths))}-{budget.source_rows}-{seed}.pt"
    network = SmallCNN(1, 40, widths)
    if not path.is_file():
        pl.seed_everything(seed, verbose=False)
        network = SmallCNN(1, 40, widths)
        data = RotatedFashionMNIST(train_rows=budget.source_rows, val_rows=0, seed=seed)
        pl.Trainer(**QUIET, max_epochs=budget.source_epochs).fit(ImageClassifier(network, 40), data)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def digits(budget: Budget, batch_size: int = 32) -> Digits:
    """The digits, enlarged to 16 pixels: 1,237 for training, 200 for validation, 360 for the test."""
    return Digits(batch_size, train_rows=budget.train_rows, test_rows=budget.test_rows, image_size=IMAGE)


def garments(budget: Budget) -> tuple[str, ...]:
    """Names of the source classes."""
    return RotatedFashionMNIST().class_names


class _OnCanvas(nn.Module):
    """A network on images that lie in the middle of a black canvas, with a new last layer."""

    def __init__(self, network: SmallCNN, frozen: bool) -> None:
        super().__init__()
        pad = (CANVAS - IMAGE) // 2
        self.body = nn.Sequential(nn.ZeroPad2d(pad), network.features, network.pool, nn.Flatten(1))
        self.frozen = frozen
        self.body.requires_grad_(not frozen)
        self.head = nn.Linear(network.classifier.in_features, 10)

    def train(self, mode: bool = True) -> _OnCanvas:
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def rival(network: SmallCNN, frozen: bool, seed: int, budget: Budget) -> dict[str, float]:
    """Linear probe (frozen) or full fine-tuning: test accuracy, bytes of what was trained, seconds."""
    pl.seed_everything(seed, verbose=False)
    host = ImageClassifier(
        _OnCanvas(network, frozen), 10, optimizer=partial(torch.optim.Adam, lr=0.01 if frozen else 1e-3)
    )
    trainer = pl.Trainer(**QUIET, max_epochs=budget.epochs)
    return tested(trainer, host, digits(budget))


def tested(trainer: pl.Trainer, host: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
    """Fit and test: accuracy, bytes of what was trained, seconds of training."""
    start = time.perf_counter()
    trainer.fit(host, data)
    seconds = time.perf_counter() - start
    found = surrounding(trainer, host, VisualPrompt)
    trained = [parameter for parameter in host.parameters() if parameter.requires_grad]
    count = sum(parameter.nbytes for parameter in trained)
    if found is not None:
        prompt = found[0].prompt
        count += prompt.num_bytes - sum(parameter.nbytes for parameter in prompt.parameters())
    accuracy = trainer.test(host, data, verbose=False)[0]["test/acc"]
    return {"accuracy": accuracy, "bytes": float(count), "seconds": seconds}


class MappingWatch(pl.Callback):
    """What became of a mapping: how much of it changed in each epoch, and whether it is that of the trained prompt."""

    def __init__(self, mapping: IterativeLabelMapping) -> None:
        self.mapping = mapping
        self.changed: list[float] = []
        self.precision = 0.0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep what the epoch's count changed."""
        self.changed.append(self.mapping.changed)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Count once more, with the final prompt."""
        found = surrounding(trainer, pl_module, VisualPrompt)
        assert found is not None
        own = found[0].mapping
        counts = self.mapping.counts(trainer, pl_module)
        self.precision = mapping_precision(own.indices, frequency_label_mapping(counts, own.sources_per_target))


def plain_garments() -> tuple[str, ...]:
    """Names of the garments."""
    return FashionMNIST.class_names
