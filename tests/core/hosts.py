"""Users' modules, data and Trainers that the tests of core attach to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.core.host import ATTACHMENT
from tests.two_ranks import QUIET

FEATURES, CLASSES = 4, 3


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class Host(pl.LightningModule):
    """A user's module: plain, mean loss, SGD with momentum and weight decay."""

    def __init__(self, network: nn.Module | None = None, optimizer: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = network if network is not None else net()
        self.optimizer = optimizer
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1])
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def rows(count: int = 24, seed: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    return TensorDataset(torch.randn(count, FEATURES, generator=generator) + F.one_hot(targets, FEATURES), targets)


def loader(count: int = 24, batch_size: int = 6, seed: int = 3) -> DataLoader[Any]:
    return DataLoader(rows(count, seed), batch_size=batch_size)


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    defaults = {"max_epochs": 1, "num_sanity_val_steps": 0, "default_root_dir": folder, "callbacks": list(callbacks)}
    return pl.Trainer(**{**QUIET, **defaults, **settings})


# what Lightning itself leaves on a module: its Trainer, its strategy's traces, the user's own list
LEFTOVERS = {
    "_trainer",
    "_device",
    "_current_fx_name",
    "_fabric",
    "_compiler_ctx",
    "seen",
    "_hparams",
    "_log_hyperparams",
}


def snapshot(host: pl.LightningModule) -> dict[str, Any]:
    """All of a host that a run of ours must leave as it was."""
    attributes = {
        name: value
        for name, value in host.__dict__.items()
        if name not in LEFTOVERS and not isinstance(value, dict) and name != "training"
    }
    assert ATTACHMENT not in host.__dict__
    return {
        "attributes": attributes,
        "modules": list(host.named_modules()),
        "names": list(host.state_dict()),
        "parameters": [(name, id(parameter)) for name, parameter in host.named_parameters()],
        "requires_grad": [parameter.requires_grad for parameter in host.parameters()],
        "hooks": [
            (name, {key: len(value) for key, value in module.__dict__.items() if "hooks" in key and value})
            for name, module in host.named_modules()
        ],
    }
