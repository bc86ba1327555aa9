"""The benchmark of the training step: what it compares is the same objective, and its rows say so at a small size."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import adversarial_step as benchmark
from lightning_trust.attacks import PGD
from lightning_trust.callbacks import AdversarialTraining
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.modules import ImageClassifier


@pytest.mark.parametrize(
    ("objective", "by_hand"), [("standard", benchmark.StandardByHand), ("trades", benchmark.TradesByHand)]
)
def test_objective_by_hand_is_ours(objective, by_hand, monkeypatch):
    rows = torch.utils.data.TensorDataset(torch.rand(32, 1, 28, 28), torch.arange(32) % 10)
    torch.manual_seed(1)
    ours = ImageClassifier("SmallCNN")
    theirs = by_hand(copy.deepcopy(ours.network))
    plain = {name: value.clone() for name, value in ours.network.state_dict().items()}
    # the same start for both: none, or the same numbers in place of normal ones
    # (large ones: where predictions hardly move, the sign of a gradient is rounding)
    ramp = torch.linspace(-90.0, 90.0, 28 * 28).reshape(1, 28, 28)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.zero_())
    monkeypatch.setattr(torch, "randn_like", lambda x: ramp.expand_as(x).clone())
    monkeypatch.setattr(SampleDraws, "normal", lambda self, *shape: ramp.expand(32, *shape).clone())
    attack = PGD(benchmark.EPS, benchmark.STEP, benchmark.STEPS, random_start=False)
    if objective == "trades":
        attack = attack.replaced(random_start="gaussian")
    for host, callbacks in ((ours, [AdversarialTraining(attack, objective=objective)]), (theirs, [])):
        trainer = benchmark.pl.Trainer(**benchmark.SILENT, max_epochs=1, limit_val_batches=0, callbacks=callbacks)
        trainer.fit(host, torch.utils.data.DataLoader(rows, batch_size=32))
    moved, apart = 0.0, 0.0
    for name, value in ours.network.state_dict().items():
        apart = max(apart, float((theirs.network.state_dict()[name] - value).abs().max()))
        moved = max(moved, float((value - plain[name]).abs().max()))
    # some signs of tiny gradients differ between two ways of writing a divergence
    assert apart < 0.01 * moved
    assert moved > 1e-3


def test_rows_at_a_small_size():
    rows = benchmark.training_step(rounds=1, batches=4, batch_size=4)
    assert len(rows) == 2
    for row in rows:
        assert row["value"] == round(row["medians"]["ours"] / row["medians"]["by hand"], 4)
        assert row["bar"] == 1.03


def test_no_parameter_gradient_is_allocated():
    for row in benchmark.memory(width=1024):
        # one of the largest layer alone would be 0.56
        assert row["reached"], row
