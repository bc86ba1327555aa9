"""CurveEvaluation: figures by hand, statistics of each point, the choice of a point, export, ranks, bad input."""

from __future__ import annotations

import copy
import json
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.attacks import FGSM, PGD
from lightning_trust.callbacks import CurveEvaluation, LoadWeights, RobustEvaluation, RobustModeConnectivity
from lightning_trust.nn import CurveNetwork
from tests.callbacks.adversarial.test_adversarial_training import in_a_box
from tests.callbacks.adversarial.test_robust_mode_connectivity import CurveHost, assert_curve_clean
from tests.conformance import CallbackConformance
from tests.two_ranks import QUIET, fit_on_two_ranks

ATTACKS = {"fgsm": FGSM(eps=0.05), "pgd": PGD(eps=0.1, steps=4)}


class TestCurveEvaluation(CallbackConformance):
    callback = CurveEvaluation
    arguments: ClassVar = {
        "attacks": {"pgd": {"class_path": "PGD", "init_args": {"eps": 0.3, "steps": 2}}},
        "num_points": 3,
    }
    host = CurveHost
    wrap_data = staticmethod(in_a_box)
    assert_clean = staticmethod(assert_curve_clean)


def rows(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    inputs = 0.6 * torch.rand(count, 4, generator=generator) + 0.4 * F.one_hot(targets, 4)
    return TensorDataset(inputs, targets)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8, eval_batch_size: int = 10, shuffle: bool = True) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size, self.shuffle = batch_size, eval_batch_size, shuffle

    def setup(self, stage):
        if stage == "fit":
            self.train = rows(24, seed=1)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self):
        return DataLoader(rows(31, seed=2), batch_size=self.eval_batch_size)

    def test_dataloader(self):
        return DataLoader(rows(31, seed=3), batch_size=self.eval_batch_size)


def plain(batch_norm: bool = True) -> nn.Sequential:
    norm = [nn.BatchNorm1d(4)] if batch_norm else []
    return nn.Sequential(*norm, nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class Curve(pl.LightningModule):
    """A curve between two networks, each trained a little, whose middle is bad."""

    def __init__(self, batch_norm: bool = True, train: bool = True, curve: bool = True) -> None:
        super().__init__()
        self.net: nn.Module = plain(batch_norm)
        if curve:
            self.net = CurveNetwork(self.net, t=0.25)
            for seed, end in enumerate(("start", "end") if train else ()):
                self.net.load_endpoint(_trained(batch_norm, seed).state_dict(), end)
            self.net.init_linear()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def _trained(batch_norm: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net, (x, y) = plain(batch_norm), rows(24, seed=1).tensors
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def trainer(folder, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**QUIET, "devices": 1, **settings})


def test_figures_are_those_of_a_plain_loop(tmp_path):
    """Each point exported, its statistics re-estimated by torch, attacked by itself."""
    host = Curve()
    attacks = {"fgsm": FGSM(eps=0.05), "pgd": PGD(eps=0.1, steps=4, random_start=False)}
    callback = CurveEvaluation(attacks, num_points=5)
    (found,) = trainer(tmp_path, callback).validate(host, datamodule=Data(shuffle=False), verbose=False)
    x, y = rows(31, seed=2).tensors
    losses, robust_losses, unions = [], [], []
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        net = host.net.export(t)
        update_bn(DataLoader(rows(24, seed=1), batch_size=8), net)
        net.eval()
        logits = {"clean": net(x), **{name: net(attack(net, x, y)) for name, attack in attacks.items()}}
        held = {name: (value.argmax(1) == y) & (logits["clean"].argmax(1) == y) for name, value in logits.items()}
        each = torch.stack([F.cross_entropy(value, y, reduction="none") for value in logits.values()])
        losses.append(each[0].mean().item())
        robust_losses.append(each.amax(0).mean().item())
        unions.append((held["fgsm"] & held["pgd"]).float().mean().item())
        expected = {
            "clean_acc": held["clean"].float().mean().item(),
            "robust_acc/fgsm": held["fgsm"].float().mean().item(),
            "robust_acc/pgd": held["pgd"].float().mean().item(),
            "robust_acc/union": unions[-1],
            "robust_acc/mean": (held["fgsm"].float().mean() + held["pgd"].float().mean()).item() / 2,
            "loss": losses[-1],
            "robust_loss": robust_losses[-1],
        }
        for key, value in expected.items():
            assert found[f"trust/curve/{t:.4g}/{key}"] == pytest.approx(value, abs=1e-5), (t, key)
    assert found["trust/curve/barrier"] == pytest.approx(max(losses) - max(losses[0], losses[-1]), abs=1e-5)
    assert len(set(unions)) > 1
    best = max(range(5), key=lambda place: found[f"trust/curve/{place / 4:.4g}/robust_acc/union"])
    assert callback.best_t == found["trust/curve/best_t"] == best / 4
    assert found["trust/curve/best/robust_acc/union"] == found[f"trust/curve/{best / 4:.4g}/robust_acc/union"]
    table = json.loads((tmp_path / "curve_validate.json").read_text())
    assert [point["t"] for point in table["points"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert table["points"][2]["robust_loss"] == pytest.approx(found["trust/curve/0.5/robust_loss"])
    assert (table["samples"], table["selected_t"]) == (31, best / 4)


def test_union_is_never_above_an_attack_or_clean(tmp_path):
    (found,) = trainer(tmp_path, CurveEvaluation(ATTACKS, num_points=7)).validate(
        Curve(), datamodule=Data(), verbose=False
    )
    for place in range(7):
        point = f"trust/curve/{place / 6:.4g}"
        least = min(found[f"{point}/{name}"] for name in ("clean_acc", "robust_acc/fgsm", "robust_acc/pgd"))
        assert found[f"{point}/robust_acc/union"] <= least
        assert found[f"{point}/robust_acc/mean"] >= found[f"{point}/robust_acc/union"]
        assert found[f"{point}/robust_loss"] >= found[f"{point}/loss"]


@pytest.mark.parametrize("batch_size", [8, 24])
def test_statistics_are_those_of_the_training_data(tmp_path, batch_size):
    """A BatchNorm in front: the mean is exact; so is the variance where a batch holds all rows."""
    kept = []

    class Look(CurveEvaluation):
        def on_validation_epoch_end(self, trainer, pl_module):
            kept.extend(copy.deepcopy(self._statistics))
            super().on_validation_epoch_end(trainer, pl_module)

    host = Curve()
    trainer(tmp_path, Look(ATTACKS, num_points=2)).validate(host, datamodule=Data(batch_size), verbose=False)
    x = rows(24, seed=1).tensors[0]
    peer = host.net.export(0.0)
    update_bn(DataLoader(x, batch_size=batch_size), peer)
    for mean, variance, count in kept:
        torch.testing.assert_close(mean, x.mean(dim=0), rtol=0.0, atol=1e-5)
        # up to the variance of the batches' means, which a running variance does not see
        tolerance = 1e-5 if batch_size == 24 else 0.02
        torch.testing.assert_close(variance, x.var(dim=0), rtol=0.0, atol=tolerance)
        torch.testing.assert_close(variance, peer[0].running_var, rtol=0.0, atol=tolerance)
        assert count == 24 // batch_size


def test_nothing_is_left_on_the_curve_or_in_the_training(tmp_path):
    """A fit with the evaluation in mid-epoch ends where one without it does, also with a loader of its own order."""

    def run(*callbacks):
        torch.manual_seed(4)
        host = Curve()
        loader = DataLoader(
            rows(24, seed=1), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(6), num_workers=0
        )
        trainer(tmp_path, RobustModeConnectivity(), *callbacks, max_epochs=2, val_check_interval=2).fit(
            host, loader, DataLoader(rows(8, seed=2), batch_size=8)
        )
        return host.state_dict(), torch.rand(1)

    (without, drawn), (evaluated, drawn_too) = run(), run(CurveEvaluation(ATTACKS, num_points=3))
    assert torch.equal(drawn, drawn_too)
    for name, value in without.items():
        assert torch.equal(value, evaluated[name]), name


def test_persistent_workers_go_on(tmp_path):
    host = Curve()
    loader = DataLoader(rows(24, seed=1), batch_size=8, num_workers=1, persistent_workers=True)
    run = trainer(tmp_path, CurveEvaluation(ATTACKS, num_points=2), max_epochs=2, val_check_interval=1)
    run.fit(host, loader, DataLoader(rows(8, seed=2), batch_size=8))
    assert run.global_step == 6


def test_choice_is_made_in_validation_and_only_there(tmp_path):
    host, callback = Curve(), CurveEvaluation(ATTACKS, num_points=5)
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="trust/curve/best/robust_acc/union", mode="max", filename="best")
    run = trainer(tmp_path, RobustModeConnectivity(), callback, saver, max_epochs=2, enable_checkpointing=True)
    run.fit(host, datamodule=Data())
    chosen = callback.best_t
    assert chosen == float(run.callback_metrics["trust/curve/best_t"])
    (found,) = run.test(host, datamodule=Data(), verbose=False)
    assert callback.best_t == chosen
    assert found["trust/curve/selected/clean_acc"] == found[f"trust/curve/{chosen:.4g}/clean_acc"]
    assert not any("best" in key for key in found)
    # another process, another grid: the choice comes with the checkpoint and is tested as well
    fresh = CurveEvaluation(ATTACKS, num_points=2)
    (again,) = trainer(tmp_path, fresh).test(
        Curve(train=False), datamodule=Data(), ckpt_path=saver.best_model_path, verbose=False
    )
    saved = torch.load(saver.best_model_path, weights_only=True)["callbacks"]["CurveEvaluation"]["best_t"]
    assert fresh.best_t == saved
    assert f"trust/curve/{saved:.4g}/clean_acc" in again
    # without a validation there is no choice
    (unchosen,) = trainer(tmp_path, CurveEvaluation(ATTACKS, num_points=2)).test(host, datamodule=Data(), verbose=False)
    assert not any("selected" in key for key in unchosen)


def test_others_measure_the_chosen_point_in_a_test(tmp_path):
    attacks = {"pgd": PGD(eps=0.05, steps=3, random_start=False)}
    host = Curve()
    callback = CurveEvaluation(attacks, num_points=4)
    trainer(tmp_path, callback).validate(host, datamodule=Data(), verbose=False)
    assert callback.best_t not in (None, float(host.net.t))
    before = {name: value.clone() for name, value in host.state_dict().items()}

    class Stop(pl.Callback):
        def on_test_batch_end(self, *arguments):
            raise RuntimeError("stop")

    evaluation = RobustEvaluation(attacks, stage="test", examples=0)
    (found,) = trainer(tmp_path, callback, evaluation).test(host, datamodule=Data(), verbose=False)
    for figure in ("clean_acc", "robust_acc/pgd"):
        assert found[f"trust/{figure}"] == pytest.approx(found[f"trust/curve/selected/{figure}"])
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, callback, Stop()).test(host, datamodule=Data(), verbose=False)
    for name, value in before.items():
        assert torch.equal(host.state_dict()[name], value), name


@pytest.mark.parametrize(("by", "compiled"), [("union", False), ("mean", True)])
def test_export_is_the_plain_network_at_the_best_point(tmp_path, by, compiled):
    host, file = Curve(), tmp_path / "best.safetensors"
    if compiled:
        host.net = torch.compile(host.net, backend="eager")
    callback = CurveEvaluation(ATTACKS, num_points=5, select_by=by, export=str(file))
    (found,) = trainer(tmp_path, callback).validate(host, datamodule=Data(batch_size=24), verbose=False)
    assert found[f"trust/curve/best/robust_acc/{by}"] == max(
        found[f"trust/curve/{place / 4:.4g}/robust_acc/{by}"] for place in range(5)
    )
    twin = Curve(curve=False)
    run = trainer(tmp_path, LoadWeights(str(file)), max_epochs=1, limit_train_batches=0, limit_val_batches=0)
    run.fit(twin, datamodule=Data())
    expected = host.net.export(callback.best_t)
    update_bn(DataLoader(rows(24, seed=1), batch_size=24), expected)
    assert list(twin.net.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(twin.net.state_dict()[name], value)
    x, y = rows(31, seed=2).tensors
    correct = (twin.net.eval()(x).argmax(1) == y).float().mean().item()
    assert correct == pytest.approx(found["trust/curve/best/clean_acc"])


def test_further_points_are_exported_in_the_order_of_their_scores(tmp_path):
    host = Curve()
    callback = CurveEvaluation(ATTACKS, num_points=5, export=str(tmp_path / "best.safetensors"), top_k=3)
    (found,) = trainer(tmp_path, callback).validate(host, datamodule=Data(), verbose=False)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        *("best.safetensors", "best_2.safetensors", "best_3.safetensors")
    ]
    points = sorted(
        (-found[f"trust/curve/{t:.4g}/robust_acc/union"], -found[f"trust/curve/{t:.4g}/robust_acc/mean"], t)
        for t in callback.positions
    )
    for (_, _, t), name in zip(points[:3], ("best", "best_2", "best_3"), strict=True):
        weights = load_file(tmp_path / f"{name}.safetensors")
        for parameter, value in host.net.weights_at(t).items():
            assert torch.equal(weights[f"net.{parameter}"], value)


@pytest.mark.parametrize(("epochs", "evaluations"), [(3, 2), (4, 3)])
def test_other_epochs_but_the_last_log_the_last_figures_again(tmp_path, epochs, evaluations):
    class Count(CurveEvaluation):
        opened = 0

        def _open(self, *arguments):
            self.opened += 1
            super()._open(*arguments)

    callback = Count(ATTACKS, num_points=2, every_n_epochs=2)
    run = trainer(tmp_path, callback, max_epochs=epochs)
    run.fit(Curve(), datamodule=Data())
    assert callback.opened == evaluations
    assert "trust/curve/best/robust_acc/union" in run.callback_metrics


def test_without_batchnorm_no_training_data_are_needed(tmp_path):
    host = Curve(batch_norm=False)
    loader = DataLoader(rows(31, seed=2), batch_size=10)
    (found,) = trainer(tmp_path, CurveEvaluation(ATTACKS, num_points=2)).validate(host, loader, verbose=False)
    assert found["trust/curve/1/clean_acc"] > 0.5
    assert not (tmp_path / "curve_test.json").exists()


class Still(Curve):
    """A host that learns nothing, so that a fit ends with the figures of its start."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def figures(run: pl.Trainer, _: Any) -> dict[str, float]:
    return {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("trust/")}


@pytest.mark.parametrize("batch_norm", [False, True])
def test_two_ranks_measure_as_one(tmp_path, batch_norm):
    """Of 31 rows one is dealt twice, and counts once; statistics are those of the training rows of both ranks."""
    first, second = fit_on_two_ranks(
        tmp_path / "two",
        Still(batch_norm),
        Data(batch_size=12, eval_batch_size=5),
        [CurveEvaluation(ATTACKS, num_points=3, seed=1)],
        figures,
        max_epochs=1,
    )
    run = trainer(tmp_path / "one", CurveEvaluation(ATTACKS, num_points=3, seed=1), max_epochs=1)
    run.fit(Still(batch_norm), datamodule=Data(batch_size=24))
    assert first == second
    # the variance within two halves of a batch is not quite that within the whole
    assert first == pytest.approx(figures(run, None), abs=0.05 if batch_norm else 1e-5)
    assert json.loads((tmp_path / "two" / "curve_validate.json").read_text())["samples"] == 31


def test_bad_input(tmp_path):
    for arguments, words in (
        ({"attacks": {}}, "`attacks` to name at least one"),
        ({"attacks": {"mean": FGSM(eps=0.1)}}, "different names"),
        ({"num_points": 1}, "`num_points` to be at least 2, but got 1"),
        ({"top_k": 0}, "`top_k` to be at least 1, but got 0"),
        ({"num_points": 2, "top_k": 3}, "`top_k` to be at most `num_points`, which is 2, but got 3"),
        ({"every_n_epochs": 0}, "`every_n_epochs`"),
        ({"bn_batches": 0}, "`bn_batches`"),
        ({"select_by": "max"}, "`select_by` to be 'union' or 'mean', but got 'max'"),
    ):
        with pytest.raises(ValueError, match=words):
            CurveEvaluation(**{"attacks": ATTACKS, **arguments})

    def validate(host, callback=None, **data):
        run = trainer(tmp_path, callback or CurveEvaluation(ATTACKS, num_points=2))
        run.validate(host, **(data or {"datamodule": Data()}), verbose=False)

    loader = DataLoader(rows(8, seed=2), batch_size=8)
    with pytest.raises(MisconfigurationException, match="is a CurveNetwork, but got Sequential"):
        validate(Curve(curve=False))
    with pytest.raises(MisconfigurationException, match="on the training data, but got none"):
        validate(Curve(), dataloaders=loader)
    with pytest.raises(MisconfigurationException, match="evaluates one data loader"):
        validate(Curve(batch_norm=False), dataloaders=[loader, loader])
    with pytest.raises(ValueError, match=r"`eps` to be in the units of the inputs"):
        validate(Curve(), CurveEvaluation({"pgd": PGD(eps=8.0)}, num_points=2))

    class Empty(Data):
        def train_dataloader(self):
            return DataLoader(self.train, batch_size=32, drop_last=True)

    with pytest.raises(ValueError, match="on the training data, but they have no batch"):
        validate(Curve(), datamodule=Empty())

    class Several(Data):
        def train_dataloader(self):
            return [super().train_dataloader()] * 2

    with pytest.raises(MisconfigurationException, match="got a list of several"):
        validate(Curve(), datamodule=Several())
    stuck = Curve(batch_norm=False)
    stuck.net = CurveNetwork(nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="running statistics of BatchNorm only.* got network.0"):
        validate(stuck)
