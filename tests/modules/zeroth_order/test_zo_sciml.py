"""The card's experiment, small: a simulator in the network needs fewer data than a network without."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import MLP

from lightning_trust.callbacks import SKSQueryMonitor
from lightning_trust.datamodules import OscillatorDataModule, oscillator_trajectory
from lightning_trust.datamodules.zeroth_order.oscillator import HIGHEST, LOWEST, TIMES, displacement
from lightning_trust.modules import SKSModule
from lightning_trust.nn import BlackBoxLayer
from tests.two_ranks import QUIET

STEPS = 120


def closed_form(points):
    return displacement(points, torch.tensor(TIMES, dtype=points.dtype))


def network(outputs):
    torch.manual_seed(0)
    return MLP(16, [32, 32, outputs], activation_layer=nn.Tanh, inplace=None)


def data(rows=20):
    return OscillatorDataModule(train_rows=rows, seed=1)


def error(module):
    (found,) = pl.Trainer(**QUIET).test(module, data(), verbose=False)
    return found["test/rmse"]


def trained(**layer):
    box = layer.pop("box", oscillator_trajectory)
    source = BlackBoxLayer(box, 8, bounds=(list(LOWEST), list(HIGHEST)), squash=True, seed=0, **layer)
    module = SKSModule(network(2), source, optimizer=lambda params: torch.optim.Adam(params, lr=1e-2))
    monitor = [] if source.simulator is None else [SKSQueryMonitor()]
    trainer = pl.Trainer(max_epochs=STEPS, gradient_clip_val=1.0, callbacks=monitor, **QUIET)
    trainer.fit(module, data())
    return error(module), monitor


@pytest.fixture(scope="module")
def twin():
    return trained(box=closed_form, direct=True)[0]


def test_estimates_come_to_what_a_differentiable_twin_comes_to(twin):
    found, (monitor,) = trained(estimator="cge")
    assert found == pytest.approx(twin, rel=0.02)
    assert monitor.totals["queries"] == STEPS * 20 * 5
    random, (monitor,) = trained(estimator="rge", q=4)
    assert random == pytest.approx(twin, rel=0.5)
    assert monitor.totals["queries"] == STEPS * 20 * 9


def test_a_network_alone_needs_more_data(twin):
    module = data()
    module.setup()
    x, y = module.train_dataset.tensors
    net = network(8)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    x, y = module.test_dataset.tensors
    assert twin < 0.8 * float(F.mse_loss(net(x), y).sqrt())
