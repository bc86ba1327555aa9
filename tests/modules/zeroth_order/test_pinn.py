"""Physics-informed training against exact solutions and plain torch."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.callbacks import ExactResume, ZerothOrderGradient
from lightning_trust.datamodules import HJB20, Heat, PDEDataModule, PDEProblem, Poisson
from lightning_trust.modules import PINNModule
from lightning_trust.nn import (
    AutogradDerivatives,
    FiniteDifference,
    SineMLP,
    SparseGridDerivatives,
    SteinDerivatives,
    TTLinear,
    tensorize,
)
from lightning_trust.optim import CGE
from tests.two_ranks import QUIET, assert_equal_states, fit_on_two_ranks


def pinn(derivatives=None, pde=None, width=8, **settings):
    pde = pde or Poisson(2)
    coordinates = pde.num_coordinates
    torch.manual_seed(1)
    return PINNModule(
        SineMLP(coordinates, width), pde, derivatives or SparseGridDerivatives(coordinates, 3, 0.05), **settings
    )


def data(pde=None, **settings):
    return PDEDataModule(
        pde or Poisson(2), **{"n_collocation": 8, "steps_per_epoch": 4, "val_points": 30, "test_points": 50, **settings}
    )


def trainer(**settings):
    return pl.Trainer(**{**QUIET, "max_epochs": 1, **settings})


class Constant(nn.Module):
    """One number everywhere."""

    def __init__(self, value=1.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.value.expand(len(x), 1)


@pytest.mark.parametrize(
    ("derivatives", "pde", "lr", "error"),
    [
        (AutogradDerivatives(), Poisson(2), 1e-2, 0.02),
        (SparseGridDerivatives(2, 3, 0.05), Poisson(2), 1e-2, 0.03),
        (SparseGridDerivatives(3, 3, 0.05), Poisson(3), 2e-2, 0.2),
        (SparseGridDerivatives(2, 3, 0.05), Heat(1), 1e-2, 0.03),
    ],
    ids=["autograd", "grid", "grid-3d", "heat"],
)
def test_learns_by_back_propagation(derivatives, pde, lr, error):
    steps = 300
    module = pinn(
        derivatives,
        pde,
        width=32,
        optimizer=lambda params: torch.optim.Adam(params, lr),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    )
    points = data(pde, n_collocation=48, steps_per_epoch=steps, val_points=0, test_points=300)
    run = trainer()
    (before,) = run.test(module, points, verbose=False)
    run.fit(module, points)
    (after,) = run.test(module, points, verbose=False)
    assert before["test/rel_l2"] > 10 * error / 3
    assert after["test/rel_l2"] < error
    assert after["test/loss"] < before["test/loss"] / 50


def test_constant_one_solves_hjb():
    module = PINNModule(Constant(), HJB20(), SparseGridDerivatives(21))
    (result,) = trainer().test(module, PDEDataModule(HJB20(), test_points=20), verbose=False)
    assert result["test/loss"] < 1e-10
    assert result["test/rel_l2"] == pytest.approx(0.0, abs=1e-7)
    assert result["test/rel_l2_smoothed"] == pytest.approx(0.0, abs=1e-7)


def test_one_step_is_that_of_plain_torch():
    module, points = pinn(FiniteDifference(h=0.05), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)), data()
    net = copy.deepcopy(module.net)
    trainer(max_steps=1, limit_val_batches=0).fit(module, points)
    x = points.train_dataloader().dataset[0].double()

    def solution(z):
        return (4 * z * (1 - z)).prod(1) * net(z.float())[:, 0]

    h = 0.05
    laplacian = sum(
        (solution(x + step) + solution(x - step) - 2 * solution(x)) / h**2
        for step in h * torch.eye(2, dtype=torch.float64)
    )
    pi = torch.pi
    source = -2 * pi**2 * (pi * x).sin().prod(1) - 4 * pi**2 * (2 * pi * x).sin().prod(1)
    (laplacian - source).square().mean().backward()
    for trained, parameter in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(trained, parameter - 1e-3 * parameter.grad)


def test_logs_are_those_of_all_points():
    module, points = pinn(), data(eval_batch_size=13)
    (validated,) = trainer().validate(module, points, verbose=False)
    x, exact = points.val_dataloader().dataset.tensors
    with torch.no_grad():
        plain = module(x.double())
        found = module.derivatives(lambda z: Poisson(2).lift(z, lambda p: module.net(p.float())[:, 0]), x.double())
    expected = {
        "val/loss": Poisson(2).residual(x.double(), found).square().mean(),
        "val/rel_l2": (plain - exact).norm() / exact.norm(),
        "val/rel_l2_smoothed": (found.value - exact).norm() / exact.norm(),
    }
    assert validated == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)


def test_training_logs_loss_and_evaluations():
    run = trainer(limit_val_batches=0)
    run.fit(pinn(), data())
    assert run.callback_metrics["train/evaluations"] == 4 * 8 * 13
    assert run.callback_metrics["train/loss"] > 0.0


def test_brings_its_own_points():
    module, run = pinn(n_collocation=5), trainer(limit_train_batches=2, limit_val_batches=1)
    run.fit(module)
    assert run.global_step == 2
    assert "val/rel_l2" in run.callback_metrics
    assert len(trainer(limit_predict_batches=1).predict(module)[0]) == 100
    (result,) = trainer(limit_test_batches=1).test(module, verbose=False)
    assert set(result) == {"test/loss", "test/rel_l2", "test/rel_l2_smoothed"}


@pytest.mark.parametrize("number", range(4))
def test_every_estimator_runs_in_all_stages(number):
    estimators = [SparseGridDerivatives(2), SteinDerivatives(8), FiniteDifference(), AutogradDerivatives()]
    module, run = pinn(estimators[number]), trainer()
    run.fit(module, data())
    run.test(module, data(), verbose=False)
    assert torch.isfinite(run.callback_metrics["test/loss"])


class Replays(pl.Callback):
    """Evaluates every step a second time, without gradients."""

    def __init__(self):
        self.pairs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning's loss is shared out over the accumulation window
        first = outputs["loss"].item() * trainer.accumulate_grad_batches
        with torch.no_grad():
            self.pairs.append((first, pl_module.training_step(batch, batch_idx).item()))


def test_a_step_evaluated_again_has_the_same_draws():
    watch = Replays()
    module = pinn(SteinDerivatives(8), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer(callbacks=[watch], limit_val_batches=0, accumulate_grad_batches=2).fit(module, data())
    assert len({first for first, _ in watch.pairs}) == 4
    assert all(first == pytest.approx(again, rel=1e-6) for first, again in watch.pairs)


def test_step_without_gradients_leaves_no_graph():
    module = pinn()
    with torch.no_grad():
        residual = module.residual(torch.rand(4, 2))
    assert not residual.requires_grad
    assert residual.dtype == torch.float64


class Gradient(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found = torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()])


@pytest.mark.parametrize("number", range(2))
def test_differences_in_the_weights_give_the_gradient_of_back_propagation(number):
    found = []
    for sources in ([], [ZerothOrderGradient(CGE(mu=1e-4))]):
        watch = Gradient()
        net = tensorize(pinn(width=16).net, rank=2, min_params=200)
        estimator = [SparseGridDerivatives(2, 3, 0.05), SteinDerivatives(8)][number]
        module = PINNModule(net, Poisson(2), estimator, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        run = trainer(max_steps=1, limit_val_batches=0, precision="64-true", callbacks=[*sources, watch])
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(std=0.3)
        run.fit(module, data())
        found.append(watch.found)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3 * found[0].abs().max().item())


def test_autocast_stays_off():
    results = []
    for precision in ("32-true", "bf16-mixed"):
        module = pinn()
        trainer(precision=precision).fit(module, data())
        results.append(module.state_dict())
    assert_equal_states(*results)


def test_float64_throughout():
    module = pinn()
    run = trainer(precision="64-true")
    run.fit(module, data())
    assert next(module.net.parameters()).dtype == torch.float64


class KilledError(Exception):
    pass


class KillAfter(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KilledError


def test_killed_and_resumed_is_bit_for_bit(tmp_path):
    def fit(*callbacks, **settings):
        module = pinn(SteinDerivatives(8))
        run = pl.Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=3, callbacks=[ExactResume(), *callbacks])
        run.fit(module, data(), **settings)
        return module

    whole = fit(ModelCheckpoint(save_top_k=0))
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    with pytest.raises(KilledError):
        fit(saving, KillAfter(6))
    # the second of four steps of the second epoch
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    resumed = fit(ModelCheckpoint(save_top_k=0), ckpt_path=str(tmp_path / "last.ckpt"))
    assert_equal_states(resumed.state_dict(), whole.state_dict())
    assert (resumed.derivatives.calls, resumed.derivatives.evaluations) == (
        whole.derivatives.calls,
        whole.derivatives.evaluations,
    )


@pytest.mark.parametrize("number", range(2))
def test_two_ranks_equal_one_with_the_whole_batch(number, tmp_path):
    def make():
        estimators = [SparseGridDerivatives(2), SteinDerivatives(8)]
        return pinn(estimators[number], optimizer=lambda p: torch.optim.SGD(p, lr=1e-4))

    first, second = fit_on_two_ranks(tmp_path / "ranks", make(), data(), [], max_epochs=1, num_sanity_val_steps=0)
    whole = make()
    trainer().fit(whole, data(n_collocation=16))
    assert_equal_states(first, second)
    assert_equal_states(first, whole.state_dict(), rtol=1e-4, atol=1e-6)


def test_tensorized_network_trains():
    module = pinn(width=32)
    small = tensorize(module.net, rank=2, min_params=512)
    assert isinstance(small.get_submodule("1"), TTLinear)
    module = PINNModule(small, Poisson(2), SparseGridDerivatives(2, 3, 0.05))
    before = [parameter.clone() for parameter in small.parameters()]
    trainer(limit_val_batches=0).fit(module, data())
    assert all(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))


class TestComparisonOfLevels:
    class Waves(nn.Module):
        def forward(self, x):
            return (40.0 * x).sin().sum(1)

    def module(self):
        return PINNModule(self.Waves(), Poisson(2), SparseGridDerivatives(2, 3, 0.1))

    def test_validation_warns_once(self, recwarn):
        run, module = trainer(), self.module()
        for _ in range(2):
            run.validate(module, data(), verbose=False)
        assert len([each for each in recwarn.list if "sparse grids of level 3 and 4 differ" in str(each.message)]) == 1

    def test_silent_where_levels_agree(self, recwarn):
        trainer().validate(pinn(), data(), verbose=False)
        assert not [each for each in recwarn.list if "sparse grids" in str(each.message)]

    def test_says_once_that_there_is_no_level_to_compare_with(self, recwarn):
        # level 4 has more than 50,000 nodes from 33 dimensions on
        pde = Poisson(34)
        module = PINNModule(SineMLP(34, 4, 2, 1), pde, SparseGridDerivatives(34, 3, 0.1))
        points = PDEDataModule(pde, 1, steps_per_epoch=1, val_points=1, test_points=1)
        run = trainer()
        for _ in range(2):
            run.validate(module, points, verbose=False)
        found = [each for each in recwarn.list if "cannot be compared with one of another level" in str(each.message)]
        assert len(found) == 1
        assert "level 3 in 34 dimensions" in str(found[0].message)


CONFIG = {
    "seed_everything": 1,
    "model": {
        "class_path": "PINNModule",
        "init_args": {
            "net": {
                "class_path": "lightning_trust.nn.tensorize",
                "init_args": {
                    "module": {"class_path": "SineMLP", "init_args": {"in_features": 3, "hidden": 16, "layers": 3}},
                    "rank": 2,
                    "shapes": {"1": [[4, 4], [4, 4]]},
                },
            },
            "pde": {"class_path": "Heat", "init_args": {"dim": 2}},
            "derivatives": {"class_path": "SparseGridDerivatives", "init_args": {"dim": 3, "sigma": 0.05}},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.005}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 10}},
        },
    },
    "data": {
        "class_path": "PDEDataModule",
        "init_args": {"pde": {"class_path": "Heat", "init_args": {"dim": 2}}, "n_collocation": 4, "val_points": 20},
    },
}


def test_yaml_builds_and_runs(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    cli = LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=[
            "fit",
            f"--config={tmp_path / 'config.yaml'}",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.max_steps=2",
            "--trainer.limit_val_batches=1",
        ],
    )
    assert isinstance(cli.model.net.get_submodule("1"), TTLinear)
    assert cli.model.pde.num_coordinates == 3
    assert cli.trainer.optimizers[0].defaults["lr"] == 0.005
    assert cli.trainer.lr_scheduler_configs[0].interval == "step"
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    torch.load(tmp_path / "cli.ckpt", weights_only=True)
    loaded = PINNModule.load_from_checkpoint(tmp_path / "cli.ckpt")
    assert_equal_states(loaded.state_dict(), cli.model.state_dict())
    assert loaded.derivatives.evaluations == cli.model.derivatives.evaluations > 0


def test_checkpoint_takes_the_parts_again(tmp_path):
    module, run = pinn(), trainer(limit_val_batches=0)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    parts = {"net": SineMLP(2, 8), "pde": Poisson(2), "derivatives": SparseGridDerivatives(2)}
    loaded = PINNModule.load_from_checkpoint(tmp_path / "last.ckpt", **parts, weights_only=True)
    assert_equal_states(loaded.state_dict(), module.state_dict())
    assert all(name.startswith("net.") for name in loaded.state_dict())


class TestBadInput:
    class Unsolved(Poisson):
        exact = PDEProblem.exact

    def test_error_without_a_solution(self):
        with pytest.raises(MisconfigurationException, match="Unsolved has none. Pass relative_l2=False."):
            pinn(pde=self.Unsolved(2))

    def test_residual_without_a_solution(self):
        module = pinn(pde=self.Unsolved(2), relative_l2=False)
        run = trainer()
        run.fit(module, data(self.Unsolved(2)))
        assert set(run.callback_metrics) == {"train/loss", "train/evaluations", "val/loss"}

    def test_data_without_a_solution(self):
        with pytest.raises(MisconfigurationException, match="but got points alone"):
            trainer().test(pinn(), data(self.Unsolved(2)), verbose=False)

    @pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(4)])
    def test_layers_that_make_it_no_function(self, layer):
        net = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1))
        with pytest.raises(MisconfigurationException, match=f"but got {type(layer).__name__} as '1'."):
            PINNModule(net, Poisson(2), FiniteDifference())
        PINNModule(nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.0)), Poisson(2), FiniteDifference())

    def test_half_precision(self):
        with pytest.raises(MisconfigurationException, match=r"but its parameters are torch.bfloat16"):
            trainer(precision="bf16-true").fit(pinn(), data())

    def test_points_of_another_problem(self):
        with pytest.raises(ValueError, match=r"Expected points of shape \(B, 2\) for Poisson, but got \(8, 3\)."):
            trainer().fit(pinn(), data(Poisson(3), val_points=0))

    def test_network_with_two_outputs(self):
        module = PINNModule(SineMLP(2, 4, 2, out_features=2), Poisson(2), FiniteDifference())
        with pytest.raises(ValueError, match=r"to map points \(3, 2\) to \(3, 1\), but got \(3, 2\)."):
            module(torch.rand(3, 2))

    def test_number_of_points(self):
        with pytest.raises(ValueError, match="Expected argument `n_collocation` to be an integer of at least 1"):
            pinn(n_collocation=0)
