from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_trust.datamodules import HJB20, CollocationPoints, PDEDataModule, PDEProblem, Poisson
from tests.two_ranks import QUIET, fit_on_two_ranks


class Seen(pl.LightningModule):
    """Keeps the training batches."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.clone())
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(**settings):
    return PDEDataModule(Poisson(2), **{"n_collocation": 6, "steps_per_epoch": 4, **settings})


def fit(module, datamodule, **settings):
    pl.Trainer(**{**QUIET, "max_epochs": 2, **settings}).fit(module, datamodule=datamodule)
    return module.seen


def test_every_step_has_fresh_points_that_only_the_seed_decides():
    torch.manual_seed(1)
    first = fit(Seen(), data())
    torch.manual_seed(2)
    again = fit(Seen(), data())
    assert len(first) == 8
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({batch.numpy().tobytes() for batch in first}) == 8
    assert not torch.equal(fit(Seen(), data(seed=1))[0], first[0])


def test_epochs_of_any_length_give_the_same_steps():
    first = fit(Seen(), data())
    assert all(
        torch.equal(a, b) for a, b in zip(first, fit(Seen(), data(steps_per_epoch=8), max_epochs=1), strict=True)
    )


def test_points_do_not_touch_the_global_generator():
    state = torch.get_rng_state()
    CollocationPoints(Poisson(2), 10, 5)[3]
    assert torch.equal(torch.get_rng_state(), state)


def test_worker_processes_draw_the_same():
    plain, working = data().train_dataloader(), data(num_workers=1).train_dataloader()
    assert all(torch.equal(a, b) for a, b in zip(plain, working, strict=True))


def test_ranks_share_the_points_of_one(tmp_path):
    found = fit_on_two_ranks(tmp_path / "ranks", Seen(), data(), [], lambda _, module: module.seen, max_epochs=2)
    whole = fit(Seen(), data(n_collocation=12))
    for step, points in enumerate(whole):
        assert torch.equal(found[0][step], points[0::2])
        assert torch.equal(found[1][step], points[1::2])


def test_fixed_points_and_exact_values():
    module = PDEDataModule(HJB20(), val_points=150, test_points=230, eval_batch_size=100)
    for loader, rows in ((module.val_dataloader(), 150), (module.test_dataloader(), 230)):
        batches, again = list(loader), list(loader)
        assert [len(points) for points, _ in batches] == [100] * (rows // 100) + [rows % 100]
        for (points, exact), (same, _) in zip(batches, again, strict=True):
            assert torch.equal(points, same)
            assert (points.dtype, exact.dtype) == (torch.float32, torch.float64)
            torch.testing.assert_close(exact, points.double()[:, :20].sum(1) + 1 - points.double()[:, 20])
    first, other = next(iter(module.val_dataloader()))[0], next(iter(module.test_dataloader()))[0]
    assert not torch.equal(first, other)
    assert PDEDataModule(HJB20(), val_points=0).val_dataloader() == []


def test_problem_without_a_solution_gives_points_alone():
    class Mine(Poisson):
        exact = PDEProblem.exact

    (batch,) = next(iter(PDEDataModule(Mine(2)).test_dataloader()))
    assert batch.shape == (100, 2)


@pytest.mark.parametrize(
    ("name", "least"),
    [("n_collocation", 1), ("steps_per_epoch", 1), ("val_points", 0), ("test_points", 1), ("eval_batch_size", 1)],
)
def test_bad_arguments(name, least):
    with pytest.raises(
        ValueError, match=f"Expected argument `{name}` to be an integer of at least {least}, but got {least - 1}."
    ):
        PDEDataModule(Poisson(2), **{name: least - 1})
