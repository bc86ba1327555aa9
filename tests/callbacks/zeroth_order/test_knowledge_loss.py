"""KnowledgeLoss: the penalty and its gradient, dropped rows, state."""

from __future__ import annotations

import copy
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_trust.callbacks import KnowledgeLoss
from lightning_trust.nn import BlackBoxLayer
from tests.conformance import CallbackConformance, Host, rows
from tests.two_ranks import QUIET, fit_on_two_ranks

BOX = {
    "class_path": "BlackBoxLayer",
    "init_args": {"fn": "numpy.tanh", "out_dim": 3, "estimator": "cge", "mu": 1e-4, "scale": 1.0},
}


class TestKnowledgeLoss(CallbackConformance):
    callback = KnowledgeLoss
    arguments: ClassVar = {"sks": BOX, "target": 0.25, "weight": 0.5}
    # differences of float64 answers at float32 points
    tolerance: ClassVar[float] = 1e-5


class TestKnowledgeLossWithRandomDirections(CallbackConformance):
    callback = KnowledgeLoss
    arguments: ClassVar = {
        "sks": {
            "class_path": "BlackBoxLayer",
            "init_args": {"fn": "numpy.tanh", "out_dim": 3, "estimator": "rge", "q": 2, "seed": 3},
        }
    }
    # differences of float64 answers at float32 points
    tolerance: ClassVar[float] = 1e-5


def first_batch():
    return tuple(column[:8] for column in rows().tensors)


class Keep(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


def fit(host, *callbacks, **settings):
    trainer = pl.Trainer(callbacks=list(callbacks), max_steps=1, **{**QUIET, **settings})
    trainer.fit(host, DataLoader(rows(), batch_size=8))
    return trainer


def assert_gradients(keep, host, loss):
    expected = torch.autograd.grad(loss, list(host.parameters()))
    for (name, _), gradient in zip(host.named_parameters(), expected, strict=True):
        torch.testing.assert_close(keep.gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def of_batch(batch):
    return batch[0][:, :3]


@pytest.mark.parametrize("target", [0.25, of_batch])
def test_the_gradient_is_that_of_loss_and_penalty(target):
    host, keep = Host(), Keep()
    twin = copy.deepcopy(host)
    trainer = fit(host, KnowledgeLoss(BlackBoxLayer("numpy.tanh", 3, "cge", mu=1e-4), target, weight=0.7), keep)
    x, y = first_batch()
    wanted = of_batch((x, y)) if callable(target) else target
    penalty = (torch.tanh(twin(x)) - wanted).square().sum(dim=1).mean()
    assert_gradients(keep, twin, F.cross_entropy(twin(x), y) + 0.7 * penalty)
    assert trainer.callback_metrics["trust/knowledge_loss"] == pytest.approx(penalty.item(), rel=1e-5)
    assert trainer.callback_metrics["train_loss"] == pytest.approx(F.cross_entropy(twin(x), y).item(), rel=1e-5)


def test_a_host_may_say_what_is_asked():
    class Says(Host):
        def knowledge_inputs(self, batch):
            return self.net[0](batch[0])[:, :2]

    host, keep = Says(), Keep()
    twin = copy.deepcopy(host)
    layer = BlackBoxLayer(lambda z: z[:, 0] * z[:, 1], 1, "cge", mu=1e-4)
    fit(host, KnowledgeLoss(layer, target=1.0), keep)
    x, y = first_batch()
    z = twin.knowledge_inputs((x, y))
    assert_gradients(keep, twin, F.cross_entropy(twin(x), y) + (z[:, 0] * z[:, 1] - 1.0).square().mean())


def test_targets_of_the_batch():
    class Regression(Host):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0])[:, 0], batch[1])

    host, keep = Regression(), Keep()
    twin = copy.deepcopy(host)
    x, y = rows().tensors
    y = y.float() / 3.0
    layer = BlackBoxLayer(lambda z: z.sum(axis=1), 1, "cge", mu=1e-4)
    trainer = pl.Trainer(callbacks=[KnowledgeLoss(layer, target="batch"), keep], max_steps=1, **QUIET)
    trainer.fit(host, DataLoader(TensorDataset(x, y), batch_size=8))
    out = twin(x[:8])
    assert_gradients(keep, twin, F.mse_loss(out[:, 0], y[:8]) + (out.sum(dim=1) - y[:8]).square().mean())


def test_without_weight_nothing_is_asked_and_nothing_changes():
    plain, ours = Host(), Host()
    fit(plain)
    callback = KnowledgeLoss(BlackBoxLayer("numpy.tanh", 3), weight=0.0)
    fit(ours, callback)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in ours.state_dict().items())
    assert callback.sks.simulator.counts.queries == 0


def test_batchnorm_statistics_move_as_without_it():
    class Normed(Host):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(16))

    hosts = [Normed(), Normed()]
    fit(hosts[0])
    fit(hosts[1], KnowledgeLoss(BlackBoxLayer("numpy.tanh", 3)))
    assert hosts[1].net[1].num_batches_tracked == 1
    assert torch.equal(hosts[0].net[1].running_mean, hosts[1].net[1].running_mean)


def fails_for_some(z):
    values = np.tanh(z)
    values[z[:, 0] > 0.0] = np.nan
    return values


class Data(pl.LightningDataModule):
    """Ranks take turns, so that one has more rows that fail than the other."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def train_dataloader(self):
        data = rows()
        sampler = DistributedSampler(data, shuffle=False) if torch.distributed.is_initialized() else None
        return DataLoader(data, batch_size=self.batch, sampler=sampler)


def test_ranks_with_unequal_failures_equal_one_rank_with_all(tmp_path):
    def made():
        return KnowledgeLoss(BlackBoxLayer(fails_for_some, 3, "cge", mu=1e-4, scale=1.0, on_failure="drop"))

    first, second = fit_on_two_ranks(tmp_path, Host(), Data(4), [made()], max_epochs=1)
    host, callback = Host(), made()
    pl.Trainer(callbacks=[callback], max_epochs=1, **QUIET).fit(host, Data(8))
    assert callback.sks.simulator.counts.failures > 0
    for name, value in host.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0.0, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="`weight` to be at least 0, but got -1.0"):
        KnowledgeLoss(BlackBoxLayer("numpy.tanh", 3), weight=-1.0)
    with pytest.raises(MisconfigurationException, match="mode='loss', which gives losses"):
        KnowledgeLoss(BlackBoxLayer("numpy.tanh", 3, mode="loss", downstream=lambda answers: answers[:, 0]))
    with pytest.raises(ValueError, match="`target` to be 'batch', a number or a function of the batch, but got 'x'"):
        KnowledgeLoss(BlackBoxLayer("numpy.tanh", 3), target="x")
    with pytest.raises(ValueError, match=r"`target` to give the shape of the answers, \(8, 3\), but got \(8, 6\)"):
        fit(Host(), KnowledgeLoss(BlackBoxLayer("numpy.tanh", 3), target=lambda batch: batch[0]))
