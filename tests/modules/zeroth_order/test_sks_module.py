"""SKSModule: the three forms of a model, dropped samples, warm start, ranks, resume."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_trust.callbacks import ExactResume, ZerothOrderGradient
from lightning_trust.modules import SKSModule
from lightning_trust.nn import BlackBoxLayer
from lightning_trust.optim import CGE
from tests.conformance import Kill, assert_equal
from tests.two_ranks import QUIET, fit_on_two_ranks

ROWS = 16


def box(points):
    """g(z) = (z1 exp(-z2), z1 + z2), as a user's program would."""
    return np.stack([points[:, 0] * np.exp(-points[:, 1]), points.sum(axis=1)], axis=1)


def box_torch(z):
    return torch.stack([z[:, 0] * torch.exp(-z[:, 1]), z.sum(dim=1)], dim=1)


def fails_for_some(points):
    values = box(points)
    values[points[:, 0] > 0.0] = np.nan
    return values


def data(rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    z = torch.tanh(x[:, :2]) + 0.2
    return TensorDataset(x, box_torch(z))


class Data(pl.LightningDataModule):
    def __init__(self, batch=8, seed=0):
        super().__init__()
        self.batch, self.seed = batch, seed

    def train_dataloader(self):
        rows = data(seed=self.seed)
        sampler = DistributedSampler(rows, shuffle=False) if torch.distributed.is_initialized() else None
        return DataLoader(rows, batch_size=self.batch, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(data(6, 1), batch_size=3)

    def test_dataloader(self):
        return DataLoader(data(9, 2), batch_size=4)


def module(fn=box, decoder=False, outputs=2, rate=0.01, **kwargs):
    torch.manual_seed(1)
    layer = BlackBoxLayer(fn, 2, "cge", mu=1e-4, scale=1.0, **{k: kwargs.pop(k) for k in LAYER & set(kwargs)})
    encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    after = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)) if decoder else None
    return SKSModule(encoder, layer, after, optimizer=lambda params: torch.optim.Adam(params, lr=rate), **kwargs)


LAYER = {"direct", "on_failure", "mode", "downstream", "executor", "workers", "tensors"}


def fit(model, callbacks=(), epochs=2, rows=None, **settings):
    settings = {**QUIET, "max_epochs": epochs, "num_sanity_val_steps": 0, **settings}
    trainer = pl.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(model, rows or Data())
    return trainer


# -- forms -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [{}, {"decoder": True}, {"decoder": True, "residual": True}])
def test_training_equals_that_through_a_differentiable_twin(form):
    ours, twin = module(**form), module(box_torch, direct=True, **form)
    start = copy.deepcopy(ours.encoder.state_dict())
    for each in (ours, twin):
        fit(each)
    assert not torch.equal(ours.encoder[0].weight, start["0.weight"])
    for (name, value), other in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0.0, atol=1e-4, msg=name)


def test_forward_is_what_the_formulas_say():
    x = data().tensors[0]
    plain, middle, residual = module(), module(decoder=True), module(decoder=True, residual=True)
    z = plain.encoder(x)
    torch.testing.assert_close(plain(x), box_torch(z), rtol=1e-5, atol=1e-6)
    answers = box_torch(middle.encoder(x))
    decoded = middle.decoder(torch.cat([x, answers], dim=1))
    torch.testing.assert_close(middle(x), decoded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(residual(x), answers + decoded, rtol=1e-5, atol=1e-6)


def test_it_learns():
    model = module(rate=0.05)
    trainer = fit(model, epochs=50, limit_val_batches=0)
    (before,) = pl.Trainer(**QUIET).test(module(), Data(), verbose=False)
    (after,) = trainer.test(model, Data(), verbose=False)
    assert after["test/rmse"] < 0.3 * before["test/rmse"]
    assert after["test/r2"] > 0.9


def test_measures():
    model = module()
    trainer = pl.Trainer(**QUIET)
    (found,) = trainer.test(model, Data(), verbose=False)
    x, y = data(9, 2).tensors
    difference = (model(x) - y).detach()
    assert found["test/rmse"] == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-5)
    assert found["test/mae"] == pytest.approx(difference.abs().mean().item(), rel=1e-5)
    spread = (y - y.mean(dim=0)).square().sum(dim=0)
    assert found["test/r2"] == pytest.approx((1 - difference.square().sum(dim=0) / spread).mean().item(), rel=1e-4)
    (seen,) = trainer.validate(model, Data(), verbose=False)
    x, y = data(6, 1).tensors
    assert seen["val/rmse"] == pytest.approx((model(x) - y).square().mean().sqrt().item(), rel=1e-5)
    assert torch.cat(trainer.predict(model, DataLoader(data(9, 2), batch_size=4))).shape == (9, 2)


def test_targets_without_a_dimension():
    x, y = data().tensors
    model = module(decoder=True, outputs=1)
    fit(model, rows=DataLoader(TensorDataset(x, y[:, 0]), batch_size=8))
    pl.Trainer(**QUIET).test(model, DataLoader(TensorDataset(x, y[:, 0]), batch_size=1), verbose=False)


# -- the loss as the box -----------------------------------------------------------------------------------------------
def squared(answers, wanted):
    return (answers - wanted).square().mean(dim=1)


def test_differences_of_the_loss_train_as_well():
    ours, twin = module(mode="loss", downstream=squared), module()
    for each in (ours, twin):
        fit(each)
    for value, other in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0.0, atol=1e-4)
    x = data().tensors[0]
    torch.testing.assert_close(ours(x), box_torch(ours.encoder(x)), rtol=1e-5, atol=1e-6)


# -- failures ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decoder", [False, True])
def test_dropped_samples_count_nowhere(decoder):
    model = module(fails_for_some, decoder, on_failure="drop")
    batch = data().tensors
    loss = model._mean(model._losses(*batch))
    known = model.sks.valid
    assert 0 < known.sum() < ROWS
    loss.backward()
    others = module(decoder=decoder)
    expected = others._mean(others._losses(*(part[known] for part in batch)))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(model.parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    (found,) = pl.Trainer(**QUIET).test(model, Data(), verbose=False)
    assert np.isfinite(found["test/rmse"])


def fails_always(points):
    return np.full((len(points), 2), np.nan)


def test_a_batch_without_any_answer_moves_nothing():
    model = module(fails_always, decoder=True, on_failure="drop")
    before = copy.deepcopy(model.state_dict())
    trainer = fit(model)
    assert trainer.global_step == 4
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_ranks_with_unequal_failures_equal_one_rank_with_all(tmp_path):
    """Rank 1's rows fail more often; the mean is over the rows of both."""
    first, second = fit_on_two_ranks(
        tmp_path / "two",
        module(fails_for_some, True, on_failure="drop"),
        Data(batch=4),
        [],
        max_epochs=2,
        num_sanity_val_steps=0,
    )
    whole = module(fails_for_some, True, on_failure="drop")
    fit(whole)
    for name, value in whole.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if "sks" not in name:
            torch.testing.assert_close(first[name], value, rtol=0.0, atol=1e-5, msg=name)


# -- warm start --------------------------------------------------------------------------------------------------------
def test_first_epochs_ask_nothing():
    asked = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            asked.append(pl_module.sks.simulator.counts.queries)

    model = module(head=nn.Linear(2, 2), data_only_epochs=2)
    head = copy.deepcopy(model.head.state_dict())
    trainer = fit(model, [Watch()], epochs=3, limit_val_batches=0)
    assert asked == [0, 0, ROWS * 5]
    assert not torch.equal(model.head.weight, head["weight"])
    # outside of a fit it is the whole model that counts
    trainer.test(model, Data(), verbose=False)
    assert model.sks.simulator.counts.queries == ROWS * 5 + 9


def test_ranks_wait_for_no_parameter_that_an_epoch_does_without(tmp_path):
    first, second = fit_on_two_ranks(
        tmp_path,
        module(decoder=True, head=nn.Linear(2, 2), data_only_epochs=1),
        Data(batch=4),
        [],
        max_epochs=2,
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- with the rest of a run --------------------------------------------------------------------------------------------
def test_full_zeroth_order_training():
    """Not even the network is differentiated: the estimate of every parameter's gradient is that of autograd."""
    ours, twin = module(), module(box_torch, direct=True)
    for each, callbacks in ((ours, [ZerothOrderGradient(CGE(mu=1e-3))]), (twin, [])):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each.configure_optimizers = lambda optimizer=optimizer: optimizer
        fit(each, callbacks, epochs=1)
    for value, other in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0.0, atol=2e-3)
    assert ours.sks.calls == 0


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    def run(folder, *callbacks, **kwargs):
        torch.manual_seed(4)
        model = module(rate=0.01)
        model.sks.estimator, model.sks.q, model.sks.scale = "rge", 3, "batch"
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        settings = {**QUIET, "enable_checkpointing": True, "max_epochs": 3}
        trainer = pl.Trainer(callbacks=[ExactResume(), saver, *callbacks], **settings)
        trainer.fit(model, Data(), **kwargs)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Kill(3))
    resumed = run(tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    assert_equal(whole.state_dict(), resumed.state_dict(), "module")


def test_workers_end_with_the_fit():
    model = module(executor="threads", workers=2)
    fit(model, epochs=1)
    assert model.sks.simulator._threads is None


def test_bf16_and_accumulation():
    trainer = fit(module(decoder=True), precision="bf16-mixed", accumulate_grad_batches=2)
    assert trainer.global_step == 2


def test_known_inputs_go_to_the_source_alone():
    def scaled(asked):
        return asked[:, :2] * asked[:, 2:]

    x, _ = data().tensors
    model = SKSModule(nn.Linear(3, 2), BlackBoxLayer(scaled, 2, "cge", scale=1.0), nn.Linear(5, 1), known=[1])
    rest = x[:, [0, 2, 3]]
    answers = model.encoder(rest) * x[:, 1:2]
    torch.testing.assert_close(model(x), model.decoder(torch.cat([rest, answers], dim=1)))
    model.zero_grad()
    model(x).sum().backward()
    expected = torch.autograd.grad(model.decoder(torch.cat([rest, answers], dim=1)).sum(), model.encoder.weight)[0]
    torch.testing.assert_close(model.encoder.weight.grad, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`known` to name columns of the inputs, but got \[1\] .* \(16, 1\)"):
        model(x[:, :1])


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_bad_input():
    for arguments, error, message in (
        ({"loss": "l3"}, ValueError, "`loss` to be one of .*, but got 'l3'"),
        ({"data_only_epochs": -1}, ValueError, "`data_only_epochs` to be at least 0, but got -1"),
        ({"residual": True}, MisconfigurationException, "residual=True .* decoder=None"),
        ({"data_only_epochs": 1}, MisconfigurationException, "data_only_epochs=1, head=None"),
        ({"head": nn.Linear(2, 2)}, MisconfigurationException, "data_only_epochs=0, head=Linear"),
        ({"mode": "loss", "downstream": squared, "known": [0]}, MisconfigurationException, "takes no `known` inputs"),
        ({"mode": "loss", "downstream": squared, "decoder": True}, MisconfigurationException, "no decoder comes after"),
    ):
        with pytest.raises(error, match=message):
            module(**arguments)
    with pytest.raises(ValueError, match=r"shape of the targets, \(8, 3\), but got \(8, 2\)"):
        fit(module(), rows=DataLoader(TensorDataset(data().tensors[0], torch.zeros(ROWS, 3)), batch_size=8))
