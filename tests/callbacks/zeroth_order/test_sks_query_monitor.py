"""SKSQueryMonitor: what is counted, told and logged, and where a run stops."""

from __future__ import annotations

import copy
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_trust.callbacks import KnowledgeLoss, SKSQueryMonitor
from lightning_trust.nn import BlackBoxLayer
from tests.conformance import CallbackConformance, Data, Host, Kill, rows
from tests.two_ranks import QUIET, fit_on_two_ranks

#: a sample costs one answer forward and two a coordinate backward
SAMPLE = 1 + 2 * 3


class Boxed(Host):
    """A user's module with a black box for its last layer."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.05, **settings) -> None:
        super().__init__(dropout, lr)
        self.net.append(BlackBoxLayer("numpy.tanh", 3, "cge", mu=1e-4, scale=1.0, **settings))


class TestSKSQueryMonitor(CallbackConformance):
    callback = SKSQueryMonitor
    host = Boxed
    arguments: ClassVar = {"budget": 100_000}
    tolerance: ClassVar[float] = 1e-5

    @staticmethod
    def comparable(state):
        # a validation after the last checkpoint has been asked for, but nobody knows of it, and it is not repeated
        totals = dict(state["totals"])
        totals["queries"] -= totals.pop("evaluation_queries")
        return {name: value for name, value in totals.items() if name != "seconds"}

    def test_bf16(self, tmp_path):
        """The layer counts its calls in integers; all else is as for other hosts."""
        host, _, _ = self.fitted(tmp_path, precision="bf16-mixed")
        values = {name: value for name, value in host.state_dict().items() if value.is_floating_point()}
        assert {value.dtype for value in values.values()} == {torch.float32}
        assert all(torch.isfinite(value).all() for value in values.values())


def fit(host, *callbacks, data=None, **settings):
    settings = {**QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0, **settings}
    trainer = pl.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(host, data or Data())
    return trainer


def test_all_that_is_asked_is_counted():
    monitor = SKSQueryMonitor()
    host = Boxed()
    trainer = fit(host, monitor, KnowledgeLoss(BlackBoxLayer("numpy.tanh", 3, "cge", scale=1.0)))
    # the penalty asks its own box, and runs the network, whose last layer is one as well
    assert monitor.totals["queries"] == 2 * 48 * 3 * SAMPLE
    logged = trainer.callback_metrics
    assert logged["trust/sks_queries"] == monitor.totals["queries"]
    assert logged["trust/sks_failures"] == logged["trust/sks_cache_hits"] == logged["trust/sks_failure_rate"] == 0.0
    assert logged["trust/sks_seconds"] > 0.0
    assert "trust/sks_snr" not in logged


def test_hits_failures_and_noise():
    def fails(z):
        values = np.tanh(z)
        values[z[:, 0] > 0.3] = np.nan
        return values

    class Masked(Host):
        def __init__(self):
            super().__init__()
            self.box = BlackBoxLayer(fails, 3, "rge", q=3, on_failure="nearest", cache=10_000)

        def forward(self, x):
            return self.box(self.net(x))

    monitor, host = SKSQueryMonitor(), Masked()
    trainer = fit(host, monitor)
    counts = copy.copy(host.box.simulator.counts)
    assert monitor.totals["failures"] == counts.failures > 0
    assert monitor.totals["hits"] == counts.hits
    assert monitor.totals["evaluation_queries"] == 0
    assert trainer.callback_metrics["trust/sks_failure_rate"] == pytest.approx(counts.failures / counts.queries)
    assert trainer.callback_metrics["trust/sks_snr"] > 0.0
    trainer.test(host, Data(), verbose=False)
    assert trainer.callback_metrics["trust/sks_queries"] == host.box.simulator.counts.queries - counts.queries


def test_one_sided_differences_are_counted():
    class Bounded(Host):
        def __init__(self):
            super().__init__()
            # most steps leave the box on one side
            self.net.append(BlackBoxLayer("numpy.tanh", 3, "cge", mu=0.9, scale=1.0, bounds=(-1.0, 1.0), squash=True))

    monitor = SKSQueryMonitor()
    host = Bounded()
    trainer = fit(host, monitor, max_epochs=1)
    assert monitor.totals["one_sided"] == host.net[-1].statistics.one_sided > 0
    assert trainer.callback_metrics["trust/sks_one_sided"] == monitor.totals["one_sided"]


@pytest.mark.parametrize(("budget", "steps"), [(8 * SAMPLE * 3, 3), (8 * SAMPLE * 4 - 1, 3), (1, 1), (10**9, 12)])
def test_the_run_stops_before_the_budget_is_spent(budget, steps):
    monitor = SKSQueryMonitor(budget=budget)
    trainer = fit(Boxed(), monitor)
    assert trainer.global_step == steps
    assert monitor.totals["queries"] == steps * 8 * SAMPLE


def test_validation_counts_as_well():
    monitor = SKSQueryMonitor()
    fit(Boxed(), monitor, num_sanity_val_steps=2, limit_val_batches=1.0)
    # two batches before, all rows after the first epoch; those after the last are not followed by a step
    assert monitor.totals["queries"] == 2 * 48 * SAMPLE + 16 + 24
    assert monitor.totals["evaluation_queries"] == 16 + 24


def test_counts_of_ranks_are_added_and_stop_both(tmp_path):
    monitor = SKSQueryMonitor(budget=8 * SAMPLE * 3)

    def result(trainer, module):
        (found,) = [each for each in trainer.callbacks if isinstance(each, SKSQueryMonitor)]
        return trainer.global_step, found.totals["queries"]

    ranks = fit_on_two_ranks(tmp_path, Boxed(), Data(batch_size=4), [monitor], result, max_epochs=2)
    # Lightning's sanity check has asked for rows of both
    assert ranks[0] == ranks[1]
    steps, queries = ranks[0]
    assert steps == 2
    assert 8 * SAMPLE * 2 < queries <= 8 * SAMPLE * 3


def test_counts_go_on_after_a_resume(tmp_path):
    def run(*callbacks, **kwargs):
        monitor = SKSQueryMonitor(budget=8 * SAMPLE * 5)
        saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last=True, save_top_k=0)
        settings = {**QUIET, "enable_checkpointing": True, "limit_val_batches": 0, "max_epochs": 3}
        trainer = pl.Trainer(callbacks=[monitor, saver, *callbacks], **settings)
        trainer.fit(Boxed(), Data(), **kwargs)
        return trainer, monitor

    with pytest.raises(RuntimeError, match="killed"):
        run(Kill(3))
    trainer, monitor = run(ckpt_path=str(tmp_path / "last.ckpt"))
    assert trainer.global_step == 5
    assert monitor.totals["queries"] == 5 * 8 * SAMPLE


def test_a_second_fit_starts_from_nothing():
    monitor, host = SKSQueryMonitor(), Boxed()
    fit(host, monitor)
    fit(host, monitor, max_epochs=1)
    assert monitor.totals["queries"] == 48 * SAMPLE


def test_costs_are_told_before_the_first_step(caplog):
    asked = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            asked.append(caplog.text)

    with caplog.at_level("INFO"):
        fit(Boxed(in_dim=3), SKSQueryMonitor(), Watch(), max_epochs=1)
    assert f"asked {SAMPLE} times for a sample in training, {SAMPLE * 48} for an epoch of 48 samples" in asked[0]
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(Boxed(), SKSQueryMonitor(budget=8 * SAMPLE), max_epochs=1)
    assert f"asked {SAMPLE} times for a sample" in caplog.text
    assert "the run stops after 56 of 56 queries; a step asks 56" in caplog.text


def test_bad_input():
    with pytest.raises(ValueError, match="`budget` to be at least 1, but got 0"):
        SKSQueryMonitor(budget=0)
    with pytest.raises(MisconfigurationException, match="counts the questions of BlackBoxLayers, but Host has none"):
        fit(Host(), SKSQueryMonitor())

    # one that autograd goes through is never asked
    class Direct(Host):
        def __init__(self):
            super().__init__()
            self.net.append(BlackBoxLayer(torch.tanh, 3, direct=True))

    with pytest.raises(MisconfigurationException, match="Direct has none"):
        fit(Direct(), SKSQueryMonitor())


def test_layers_that_a_host_builds_late_are_found():
    class Late(Host):
        def configure_model(self):
            if len(self.net) == 4:
                self.net.append(BlackBoxLayer("numpy.tanh", 3, "cge"))

    monitor = SKSQueryMonitor()
    fit(Late(), monitor, max_epochs=1, data=DataLoader(rows(), batch_size=8))
    assert monitor.totals["queries"] == 48 * SAMPLE
    assert isinstance(Late().net, nn.Sequential)
