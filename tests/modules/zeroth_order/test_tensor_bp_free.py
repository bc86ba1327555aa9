"""A network in tensor-train form that solves a differential equation, trained by HybridZO from values alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.callbacks import ZerothOrderGradient
from lightning_trust.datamodules import HJB20, PDEDataModule, Poisson
from lightning_trust.modules import PINNModule
from lightning_trust.nn import AutogradDerivatives, SineMLP, SparseGridDerivatives, tensorize
from lightning_trust.optim import HybridZO
from tests.two_ranks import QUIET

HYBRID = partial(HybridZO, lr=0.01, mu=1e-3, q=5, switch="epoch", switch_epoch=4, coordinate_lr=1e-4, seed=1)


def module(optimizer: Any = HYBRID, **settings: Any) -> PINNModule:
    torch.manual_seed(1)
    net = tensorize(SineMLP(1, 16, 3, 1), rank=2, shapes={"1": ((4, 4), (4, 4))})
    derivatives = settings.pop("derivatives", SparseGridDerivatives(1, 3, 0.05))
    return PINNModule(net, Poisson(1), derivatives, optimizer=optimizer, **settings)


def data() -> PDEDataModule:
    return PDEDataModule(Poisson(1), 16, steps_per_epoch=20, val_points=0, test_points=200)


def error(host: PINNModule) -> float:
    (found,) = pl.Trainer(**QUIET).test(host, data(), verbose=False)
    return found["test/rel_l2"]


def test_solves_an_equation_without_a_derivative(monkeypatch):
    host = module()
    start = error(host)

    def differentiated(*_: Any, **__: Any) -> None:
        raise AssertionError("a derivative was asked for")

    monkeypatch.setattr(torch.autograd, "backward", differentiated)
    monkeypatch.setattr(torch.autograd, "grad", differentiated)
    source = ZerothOrderGradient()
    run = pl.Trainer(**QUIET, max_epochs=6, callbacks=[source])
    run.fit(host, data())
    assert run.optimizers[0].phase == "coordinates"
    assert error(host) < 0.25 * start
    # four epochs of random estimates, and two of about half of the coordinates
    d = sum(parameter.numel() for parameter in host.parameters())
    assert source.queries == pytest.approx(20 * (4 * 10 + 2 * d), rel=0.1)


def test_derivatives_by_automatic_differentiation_are_refused():
    host = module(derivatives=AutogradDerivatives())
    with pytest.raises(
        MisconfigurationException, match=r"PINNModule.training_step calls `torch.autograd.grad`.*Sparse"
    ):
        pl.Trainer(**QUIET, max_epochs=1, callbacks=[ZerothOrderGradient()]).fit(host, data())


def test_network_of_the_paper_takes_a_step():
    """The HJB equation in 20 dimensions: 1,929 weights, 925 values a point."""
    torch.manual_seed(1)
    shapes = {"0": ((1, 1, 3, 7), (8, 4, 4, 4)), "1": ((4, 4, 4, 8), (8, 4, 4, 4))}
    net = tensorize(SineMLP(21, 512, 3, 1), rank=2, shapes=shapes)
    assert sum(parameter.numel() for parameter in net.parameters()) == 1929
    derivatives = SparseGridDerivatives(21, 3, 0.1)
    host = PINNModule(net, HJB20(), derivatives, optimizer=partial(HybridZO, q=2, seed=1))
    before = [parameter.clone() for parameter in net.parameters()]
    points = PDEDataModule(HJB20(), 2, steps_per_epoch=1, val_points=0, test_points=2)
    source = ZerothOrderGradient()
    pl.Trainer(**QUIET, max_steps=2, callbacks=[source]).fit(host, points)
    assert all(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert source.queries == 2 * 2 * 2
    # a clean evaluation in each step, four of its estimate, and one more to see that a loss is the same twice
    assert derivatives.evaluations == 11 * 2 * 925
