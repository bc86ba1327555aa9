"""SolverCorrection: rollouts against a loop by hand, gradients against one another, what is logged, bad input."""

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
from lightning_trust.modules import SolverCorrection
from lightning_trust.nn import BlackBoxLayer
from lightning_trust.optim import CGE
from tests.conformance import Kill, assert_equal
from tests.two_ranks import QUIET, fit_on_two_ranks

N, T, ROWS = 3, 4, 8


def turned(states):
    """A step of a solver, as a user's program would have it: turned and damped, not linearly."""
    return np.tanh(0.9 * np.roll(states, 1, axis=1) + 0.1)


def turned_torch(states):
    return torch.tanh(0.9 * states.roll(1, dims=-1) + 0.1)


def rows(seed=0, dtype=torch.float32):
    """Trajectories of a solver that a linear correction makes of the one above."""
    state = torch.randn(ROWS, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start, found = state, []
    for _ in range(T):
        solved = turned_torch(state)
        state = solved + 0.1 * solved.flip(-1) - 0.05
        found.append(state)
    return TensorDataset(start.to(dtype), torch.stack(found, dim=1).to(dtype))


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(rows(), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(rows(1), batch_size=4)

    def test_dataloader(self):
        return DataLoader(rows(2), batch_size=4)

    def predict_dataloader(self):
        return self.test_dataloader()


def asked(**settings):
    return BlackBoxLayer(turned, out_dim=N, **{"estimator": "cge", "mu": 1e-5, "scale": 1.0} | settings)


def module(solver=None, interactive=True, lr=0.05, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Linear(N, N).to(dtype)
    return SolverCorrection(
        asked() if solver is None else solver, net, interactive, lambda params: torch.optim.Adam(params, lr=lr)
    )


def loss_of(host, batch):
    return host.training_step(batch, 0)


def test_loss_of_a_rollout():
    host, batch = module(dtype=torch.float64), rows(dtype=torch.float64)[:]
    state, total = batch[0].numpy(), 0.0
    weight, bias = (parameter.detach().numpy() for parameter in host.correction.parameters())
    for step in range(T):
        solved = turned(state)
        state = solved + solved @ weight.T + bias
        total += np.square(state - batch[1][:, step].numpy()).mean()
    assert loss_of(host, batch).item() == pytest.approx(total / T, rel=1e-12)


def test_loss_of_single_steps():
    host, batch = module(interactive=False, dtype=torch.float64), rows(dtype=torch.float64)[:]
    before = np.concatenate([batch[0][:, None], batch[1][:, :-1]], axis=1).reshape(-1, N)
    solved = torch.from_numpy(turned(before))
    expected = (solved + host.correction(solved) - batch[1].reshape(-1, N)).square().mean()
    found = loss_of(host, batch)
    torch.testing.assert_close(found, expected)
    # every state is asked for once, and the gradient is that of the network alone
    assert host.solver.simulator.counts.queries == ROWS * T
    for mine, other in zip(
        torch.autograd.grad(found, host.correction.parameters()),
        torch.autograd.grad(expected, host.correction.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    assert host.solver.simulator.counts.queries == ROWS * T


def gradient(host, batch):
    return torch.cat(
        [each.flatten() for each in torch.autograd.grad(loss_of(host, batch), host.correction.parameters())]
    )


def test_three_ways_to_one_gradient():
    batch = rows(dtype=torch.float64)[:]
    exact = gradient(module(BlackBoxLayer(turned_torch, out_dim=N, direct=True), dtype=torch.float64), batch)
    torch.testing.assert_close(gradient(module(dtype=torch.float64), batch), exact, rtol=0.0, atol=1e-8)
    for chunk in ("auto", 1):
        host = module(dtype=torch.float64)
        with torch.no_grad():
            CGE(mu=1e-5, central=True, chunk=chunk).estimate(
                lambda host=host: loss_of(host, batch), dict(host.named_parameters()), module=host
            )
        found = torch.cat([parameter.grad.flatten() for parameter in host.correction.parameters()])
        torch.testing.assert_close(found, exact, rtol=0.0, atol=1e-8)
    # a rollout is not a sum of single steps
    alone = gradient(module(interactive=False, dtype=torch.float64), batch)
    assert (alone - exact).norm() > 0.05 * exact.norm()


def test_weights_are_evaluated_together():
    calls = []

    def watched(states):
        calls.append(len(states))
        return turned(states)

    host, batch = module(BlackBoxLayer(watched, out_dim=N)), rows()[:]
    weights = sum(parameter.numel() for parameter in host.parameters())
    with torch.no_grad():
        CGE(central=True).estimate(lambda: loss_of(host, batch), dict(host.named_parameters()), module=host)
    # a weight matrix at a time, on each side
    assert max(calls) == ROWS * N * N
    assert len(calls) < T * weights


@pytest.mark.parametrize("way", ["zeroth order", "estimated", "single steps"])
def test_a_run_learns_the_correction(way):
    pl.seed_everything(1, verbose=False)
    host = module(interactive=way != "single steps")
    callbacks = [ZerothOrderGradient(CGE(mu=1e-3, central=True))] if way == "zeroth order" else []
    trainer = pl.Trainer(**QUIET, max_epochs=100, callbacks=callbacks)
    trainer.fit(host, Data())
    assert trainer.callback_metrics["val/mae"] < 0.02
    assert trainer.progress_bar_metrics.keys() == {"train/mae", "val/mae"}
    assert 0.0 < trainer.callback_metrics["train/mae"] < 0.05
    assert trainer.callback_metrics["train/loss"] < trainer.callback_metrics["train/mae"]
    (found,) = trainer.test(host, Data(), verbose=False)
    assert set(found) == {"test/mae", "test/mae_end", "test/mae_solver"}
    states, trajectories = rows(2)[:]
    with torch.no_grad():
        rollout = host(states, T)
    assert found["test/mae"] == pytest.approx(float((rollout - trajectories).abs().mean()), rel=1e-5)
    assert found["test/mae_end"] == pytest.approx(float((rollout[:, -1] - trajectories[:, -1]).abs().mean()), rel=1e-5)
    state, errors = states.numpy(), []
    for step in range(T):
        state = turned(state)
        errors.append(np.abs(state - trajectories[:, step].numpy()).mean())
    assert found["test/mae_solver"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert found["test/mae"] < 0.2 * found["test/mae_solver"]
    predicted = torch.cat(trainer.predict(host, Data()))
    torch.testing.assert_close(predicted, rollout)


def test_a_killed_run_resumes(tmp_path):
    def run(folder, *callbacks, **kwargs):
        host = module()
        torch.manual_seed(4)
        saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        settings = QUIET | {"enable_checkpointing": True, "max_epochs": 2}
        every = [ZerothOrderGradient(CGE()), ExactResume(), saver, *callbacks]
        pl.Trainer(**settings, callbacks=every).fit(host, Data(), **kwargs)
        return host

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Kill(3))
    resumed = run(tmp_path / "killed", ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    assert_equal(whole.state_dict(), resumed.state_dict(), "module")


class OneRankEach(pl.LightningDataModule):
    """Half of each batch of four for each of two ranks."""

    def train_dataloader(self):
        dataset = rows()
        return DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset, shuffle=False))


def test_two_ranks_equal_one(tmp_path):
    first, second = fit_on_two_ranks(tmp_path, module(), OneRankEach(), [], max_steps=2)
    whole = module()
    loader = DataLoader(rows(), batch_size=4)
    pl.Trainer(**QUIET, max_steps=2).fit(whole, loader)
    for name, value in whole.correction.state_dict().items():
        assert torch.equal(first[f"correction.{name}"], second[f"correction.{name}"])
        torch.testing.assert_close(first[f"correction.{name}"], value, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s, t: (s, t[:, 0]),
            r"states \(B, n\) and trajectories \(B, T, n\), but got shapes \(8, 3\) and \(8, 3\)",
        ),
        (lambda s, t: (s[:4], t), r"but got shapes \(4, 3\) and \(8, 4, 3\)"),
        (lambda s, t: (s[:, 0], t), r"but got shapes \(8,\) and \(8, 4, 3\)"),
        (lambda s, t: (s[:, :2], t[..., :2]), r"states of 3 numbers, which are what the solver gives .*, but got 2"),
    ],
)
def test_batches_of_the_wrong_shape(change, words):
    with pytest.raises(ValueError, match=words):
        loss_of(module(), change(*rows()[:]))


def test_bad_input():
    with pytest.raises(MisconfigurationException, match="gives states, but got one with mode='loss'"):
        SolverCorrection(asked(mode="loss", downstream=lambda answers: answers.sum(dim=1)), nn.Linear(N, N))
    with pytest.raises(MisconfigurationException, match="on_failure='drop' leaves some out"):
        SolverCorrection(asked(on_failure="drop"), nn.Linear(N, N))
    with pytest.raises(MisconfigurationException, match="is a BlackBoxLayer, but got Tanh. Wrap what takes"):
        SolverCorrection(nn.Tanh(), nn.Linear(N, N))
    host = SolverCorrection(asked(), nn.Linear(N, 1))
    with pytest.raises(ValueError, match=r"`correction` to give the shape of the states, \(8, 3\), but got \(8, 1\)"):
        loss_of(host, rows()[:])


def test_copies_and_checkpoints(tmp_path):
    host = module()
    assert copy.deepcopy(host)(torch.zeros(1, N), 2).shape == (1, 2, N)
    trainer = pl.Trainer(**QUIET, max_steps=1)
    trainer.fit(host, Data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = SolverCorrection.load_from_checkpoint(
        tmp_path / "last.ckpt", solver=asked(), correction=nn.Linear(N, N), interactive=False
    )
    assert_equal(loaded.correction.state_dict(), host.correction.state_dict(), "correction")
