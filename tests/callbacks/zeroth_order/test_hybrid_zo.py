"""HybridZO and SignSCD in a Trainer: an unchanged module, whole runs, resume, and ranks that stay together."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_trust.callbacks import ExactResume, ZerothOrderGradient
from lightning_trust.nn import tensorize
from lightning_trust.optim import HybridZO, SignSCD
from tests.conformance import BATCH, ROWS, Data, Host, Kill, rows
from tests.two_ranks import assert_equal_states, fit_on_two_ranks

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
STEPS = ROWS // BATCH
#: random estimates of which one step in ten is an improvement, so that patience runs out in the second epoch
HYBRID = {"lr": 0.3, "mu": 0.05, "q": 2, "window": 2, "patience": 2, "coordinate_lr": 0.02, "seed": 5}
OPTIMIZERS = {
    "plateau": partial(HybridZO, **HYBRID),
    "epoch": partial(HybridZO, **{**HYBRID, "switch": "epoch", "switch_epoch": 1}),
    "votes": partial(HybridZO, **{**HYBRID, "switch": "epoch", "switch_epoch": 1, "rule": "batch"}),
    "sign": partial(SignSCD, lr=0.02, coordinate_dropout=0.8, seed=5),
    "batch": partial(SignSCD, lr=0.005, rule="batch", seed=5),
}


class Small(Host):
    """A network in tensor-train form with an optimizer that asks for losses itself."""

    def __init__(self, optimizer=OPTIMIZERS["plateau"], dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.net = tensorize(self.net, rank=1, min_params=60)
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(self.named_parameters())


class Phases(pl.Callback):
    """Keeps the phase after each step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        self.seen.append(optimizer.phase if isinstance(optimizer, HybridZO) else "coordinates")


def trainer(*callbacks: Any, **settings: Any) -> pl.Trainer:
    return pl.Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 2, **settings})


def loader() -> DataLoader:
    return DataLoader(rows(), batch_size=BATCH)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_run_equals_a_plain_loop(name):
    host, twin = (Small(OPTIMIZERS[name]).double() for _ in range(2))
    source, phases = ZerothOrderGradient(), Phases()
    run = trainer(source, phases, precision="64-true")
    run.fit(host, loader())
    optimizer = OPTIMIZERS[name](twin.named_parameters(), module=twin.net)
    seen = []
    for epoch in range(2):
        if isinstance(optimizer, HybridZO):
            optimizer.begin_epoch(epoch)
        for x, y in loader():
            optimizer.step(lambda x=x, y=y: F.cross_entropy(twin.net(x.double()), y))
            seen.append(getattr(optimizer, "phase", "coordinates"))
    assert_equal_states(host.state_dict(), twin.state_dict(), rtol=0.0, atol=1e-9)
    assert not torch.equal(host.net[3].weight, Small().double().net[3].weight)
    assert phases.seen == seen
    assert "coordinates" in seen
    assert ("random" in seen) == ("phase" in dir(optimizer))
    assert run.global_step == 2 * STEPS
    assert run.callback_metrics["trust/zo_queries"] == source.queries > 2 * STEPS * 4


def test_what_is_monitored_is_reported_after_each_validation():
    host, phases = Small(partial(HybridZO, **{**HYBRID, "monitor": "val_loss", "patience": 1, "window": 1})), Phases()
    told = []

    class Reads(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            told.append(trainer.callback_metrics["val_loss"].item())

    run = trainer(ZerothOrderGradient(), phases, Reads(), max_epochs=6)
    run.fit(host, loader(), Data().val_dataloader())
    worse = next(epoch for epoch in range(5) if told[epoch + 1] >= min(told[: epoch + 1]))
    assert phases.seen == ["random"] * STEPS * (worse + 2) + ["coordinates"] * STEPS * (4 - worse)
    host = Small(partial(HybridZO, **{**HYBRID, "monitor": "val/acc"}))
    with pytest.raises(MisconfigurationException, match=r"monitor='val/acc', but a validation logged .*val_loss"):
        trainer(ZerothOrderGradient()).fit(host, loader(), Data().val_dataloader())


@pytest.mark.parametrize("after", [3, 8])
@pytest.mark.parametrize("name", ["plateau", "epoch", "batch"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, name, after):
    def run(folder, *extra, **kwargs):
        torch.manual_seed(11)
        host, phases = Small(OPTIMIZERS[name], dropout=0.3), Phases()
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        callbacks = [ZerothOrderGradient(), ExactResume(), saver, phases, *extra]
        each = trainer(*callbacks, enable_checkpointing=True, default_root_dir=folder)
        each.fit(host, Data(shuffle=True), **kwargs)
        return host, phases.seen

    whole, seen = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Kill(after))
    torch.rand(3)
    resumed, rest = run(tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    assert_equal_states(whole.state_dict(), resumed.state_dict())
    assert seen[-len(rest) :] == rest
    assert seen[-1] == "coordinates"


class SameData(Data):
    """The same batches on all ranks."""

    def train_dataloader(self):
        return DataLoader(rows(), batch_size=self.batch_size)


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("plateau", "data"),
        ("votes", "data"),
        ("sign", "data"),
        ("plateau", "queries"),
        ("sign", "queries"),
        ("batch", "queries"),
    ],
)
def test_two_ranks_stay_bit_identical(tmp_path, name, parallel):
    """Generators differ, and with data of their own so do the losses that steps and phases are decided by."""
    source = ZerothOrderGradient(parallel=parallel)
    shared = parallel == "queries"

    def result(run, module):
        optimizer = run.optimizers[0]
        return module.state_dict(), getattr(optimizer, "phase", "coordinates"), run.callbacks[1].bytes_sent

    found = fit_on_two_ranks(
        tmp_path,
        Small(OPTIMIZERS[name], dropout=0.3),
        SameData() if shared else Data(batch_size=4),
        [source],
        result,
        max_epochs=2,
        use_distributed_sampler=not shared,
    )
    (first, phase, sent), (second, other, _) = found
    assert_equal_states(first, second)
    assert phase == other == "coordinates"
    assert not torch.equal(first["net.3.weight"], Small().net[3].weight)
    assert sent > 0
