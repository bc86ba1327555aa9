"""RobustModeConnectivity: curve training by hand, the penalty, attacks at the drawn point, ranks, bad input."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trust.attacks import MSD, PGD
from lightning_trust.callbacks import AdversarialTraining, RobustModeConnectivity
from lightning_trust.core.host import ATTACHMENT
from lightning_trust.nn import CurveNetwork
from tests.conformance import CallbackConformance, Host
from tests.two_ranks import QUIET, fit_on_two_ranks, run_on_two_ranks


class CurveHost(Host):
    """The host of the conformance tests with a curve between two networks."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.05) -> None:
        super().__init__(dropout, lr)
        first = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.net = CurveNetwork(self.net)
        self.net.load_endpoint({name: -0.5 * value for name, value in first.items()}, "end")
        self.net.init_linear()


def assert_curve_clean(host, before):
    """In place of what the conformance tests look at: the ends take no gradients, before or after."""
    assert ATTACHMENT not in host.__dict__
    assert host.net.t == 0.5
    assert [name for name, value in host.net.named_parameters() if value.requires_grad] == [
        f"bends.0.{name}" for name in ("0.weight", "0.bias", "3.weight", "3.bias")
    ]


class TestRobustModeConnectivity(CallbackConformance):
    callback = RobustModeConnectivity
    arguments: ClassVar = {"weight_decay": 0.01}
    host = CurveHost
    assert_clean = staticmethod(assert_curve_clean)


class Curve(pl.LightningModule):
    """A curve between two small networks; SGD with momentum."""

    def __init__(self, batch_norm: bool = False, weight_decay: float = 0.0, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if batch_norm else []), nn.ReLU(), nn.Linear(8, 3)]
        end = copy.deepcopy(nn.Sequential(*layers))
        for parameter in end.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.net = CurveNetwork(nn.Sequential(*layers), **arguments)
        self.net.load_endpoint(end.state_dict(), "end")
        self.net.init_linear()
        self.weight_decay = weight_decay
        self.seen: list[tuple[float, torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        self.seen.append((float(self.net.t), inputs.clone()))
        return F.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=self.weight_decay)


def data(rows: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.rand(rows, 4, generator=generator), torch.arange(rows) % 3)


def fit(host: pl.LightningModule, callbacks: list[pl.Callback], **settings: Any) -> pl.LightningModule:
    trainer = pl.Trainer(callbacks=callbacks, **{**QUIET, "devices": 1, "max_epochs": 1, **settings})
    trainer.fit(host, DataLoader(data(), batch_size=8))
    return host


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
@pytest.mark.parametrize("attack", [None, PGD(eps=0.0, steps=3)])
def test_three_steps_equal_curve_training_by_hand(kind, attack):
    """Without an attack, or with a radius of zero: tensors, formulas and SGD written out."""
    wd, callbacks = 0.1, [RobustModeConnectivity(weight_decay=0.1)]
    host = Curve(curve=kind)
    first, last = ({name: value.clone() for name, value in host.net.weights_at(t).items()} for t in (0.0, 1.0))
    middle = {name: (0.5 * (first[name] + last[name])).detach().requires_grad_() for name in first}
    momentum = {name: torch.zeros_like(value) for name, value in middle.items()}
    fit(host, [*callbacks, *([AdversarialTraining(attack)] if attack else [])])
    ts = [t for t, _ in host.seen]
    assert len(set(ts)) == 3
    for t, (x, y) in zip(ts, DataLoader(data(), batch_size=8), strict=True):
        if kind == "bezier":
            counts = ((1 - t) ** 2, 2 * t * (1 - t), t**2)
        else:
            counts = (max(0.0, 1 - 2 * t), 1 - abs(2 * t - 1), max(0.0, 2 * t - 1))
        at = {name: counts[0] * first[name] + counts[1] * middle[name] + counts[2] * last[name] for name in first}
        logits = F.linear(F.linear(x, at["0.weight"], at["0.bias"]).relu(), at["2.weight"], at["2.bias"])
        loss = F.cross_entropy(logits, y) + 0.5 * wd * sum(value.square().sum() for value in at.values())
        for (name, bend), gradient in zip(
            middle.items(), torch.autograd.grad(loss, list(middle.values())), strict=True
        ):
            momentum[name] = 0.9 * momentum[name] + gradient
            bend.data -= 0.1 * momentum[name]
    for name, value in middle.items():
        torch.testing.assert_close(host.net.bends[0].get_parameter(name), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(host.net.network.get_parameter(name), first[name])
        assert torch.equal(host.net.bends[1].get_parameter(name), last[name])


@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.1, steps=3, random_start=False),
        MSD(eps_linf=0.05, eps_l2=0.2, eps_l1=0.5, steps=3, batch_norm="batch"),
    ],
)
def test_attacks_are_made_at_the_point_of_the_step(attack):
    host = Curve(batch_norm=True)
    twin = copy.deepcopy(host)
    fit(host, [RobustModeConnectivity(), AdversarialTraining(attack)], limit_train_batches=1)
    x, y = (column[:8] for column in data().tensors)
    (t, adversarial), *_ = host.seen
    expected = attack(twin.net.export(t), x, y)
    torch.testing.assert_close(adversarial, expected, rtol=0.0, atol=1e-6)
    assert not torch.equal(adversarial, x)
    elsewhere = attack(twin.net.export(1.0 - t), x, y)
    assert not torch.allclose(adversarial, elsewhere, atol=1e-3)


def test_positions_are_uniform_and_named_by_the_seed():
    runs = [fit(Curve(), [RobustModeConnectivity(seed=seed)], max_epochs=20) for seed in (1, 1, 2)]
    first, again, other = ([t for t, _ in host.seen] for host in runs)
    assert first == again
    assert first != other
    assert len(first) == 60
    # Kolmogorov's distance from the uniform distribution, at 0.1 %
    distance = max(abs(t - (place + 0.5) / 60) for place, t in enumerate(sorted(first)))
    assert distance < 1.95 / 60**0.5


def test_without_weight_decay_the_loss_is_the_hosts():
    callback = RobustModeConnectivity(weight_decay=0.0)
    assert callback.all_claims == ()
    assert RobustModeConnectivity().all_claims == ("loss",)


def test_an_exception_gives_the_position_back():
    class Fails(Curve):
        def backward(self, loss, *args, **kwargs):
            raise ZeroDivisionError

    host = Fails(t=0.25)
    with pytest.raises(ZeroDivisionError):
        fit(host, [RobustModeConnectivity()])
    assert host.net.t == 0.25


def test_a_compiled_curve_trains_as_it_is():
    hosts = [Curve(), Curve()]
    hosts[1].net = torch.compile(hosts[1].net, backend="eager")
    for host in hosts:
        fit(host, [RobustModeConnectivity()])
    weights = [next(value for name, value in host.named_parameters() if "bends.0.0.w" in name) for host in hosts]
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("same", [True, False])
def test_two_ranks(tmp_path, same):
    results = fit_on_two_ranks(
        tmp_path,
        Curve(),
        DataLoader(data(), batch_size=4),
        [RobustModeConnectivity(same_t_on_ranks=same, seed=1)],
        lambda _, host: {"state": host.state_dict(), "ts": [t for t, _ in host.seen]},
        max_epochs=1,
    )
    first, second = results
    assert (first["ts"] == second["ts"]) is same
    assert len(first["ts"]) == 3
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    start = Curve().net.bends[0].state_dict()
    assert not torch.equal(first["state"]["net.bends.0.0.weight"], start["0.weight"])


def test_a_decaying_optimizer_is_warned_of():
    with pytest.warns(UserWarning, match="Set the optimizer's weight_decay to 0"):
        fit(Curve(weight_decay=0.1), [RobustModeConnectivity()], fast_dev_run=True)


def test_bad_input():
    for wd in (-1e-4, float("nan")):
        with pytest.raises(ValueError, match=f"`weight_decay` to be at least 0, but got {wd}"):
            RobustModeConnectivity(weight_decay=wd)
    with pytest.raises(MisconfigurationException, match="is a CurveNetwork, but got Sequential"):
        fit(Host(), [RobustModeConnectivity()])
    with pytest.raises(MisconfigurationException, match="AdversarialTraining attacks before RobustModeConnectivity"):
        fit(Curve(), [AdversarialTraining(PGD(eps=0.1)), RobustModeConnectivity()])
    with pytest.raises(MisconfigurationException, match="got two RobustModeConnectivity"):
        fit(Curve(), [RobustModeConnectivity(), RobustModeConnectivity(name="second")])
    same = Curve()
    same.net.load_endpoint(same.net.export(0.0).state_dict(), "end")
    with pytest.raises(MisconfigurationException, match="both ends of the curve have the same weights"):
        fit(same, [RobustModeConnectivity()])


def test_points_of_their_own_are_refused_under_shared_statistics(tmp_path):
    class Shared(Curve):
        def configure_model(self):
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    def refused(rank, settings):
        callback = RobustModeConnectivity(same_t_on_ranks=False)
        host = Shared(batch_norm=True)
        host.configure_model()
        with pytest.raises(MisconfigurationException, match="SyncBatchNorm shares statistics"):
            callback.begin(pl.Trainer(**settings), host)
        return True

    assert run_on_two_ranks(tmp_path, refused, {**QUIET, "devices": 1}) == [True, True]
