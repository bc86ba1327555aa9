"""AdversarialTraining: objectives against their formulas, natural training at eps 0, ranks, modes, bad input."""

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

from lightning_trust.attacks import FGSM, MSD, PGD, FastFGSM
from lightning_trust.callbacks import (
    MART,
    TRADES,
    AdversarialTraining,
    CleanAndAdversarial,
    FastBAT,
    GradAlign,
    StandardAT,
)
from lightning_trust.callbacks.adversarial.objectives import Crafting
from lightning_trust.core.schedules import LinearWarmup
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial import mart_loss, trades_kl
from tests.conformance import CallbackConformance
from tests.two_ranks import QUIET

SPACE = InputSpace(-8.0, 8.0)


def in_a_box(data):
    data.input_space = SPACE
    return data


class TestStandard(CallbackConformance):
    callback = AdversarialTraining
    arguments: ClassVar = {"attack": {"class_path": "PGD", "init_args": {"eps": 0.3, "steps": 3}}}
    wrap_data = staticmethod(in_a_box)


class TestTRADES(CallbackConformance):
    callback = AdversarialTraining
    arguments: ClassVar = {
        "attack": {"class_path": "PGD", "init_args": {"eps": 0.3, "steps": 2}},
        "objective": {"class_path": "TRADES", "init_args": {"beta": 3.0}},
    }
    wrap_data = staticmethod(in_a_box)


class TestMART(CallbackConformance):
    callback = AdversarialTraining
    arguments: ClassVar = {
        "attack": {"class_path": "PGD", "init_args": {"eps": 0.3, "steps": 2}},
        "objective": "mart",
    }
    wrap_data = staticmethod(in_a_box)


class TestFastBAT(CallbackConformance):
    callback = AdversarialTraining
    arguments: ClassVar = {
        "attack": {"class_path": "FastFGSM", "init_args": {"eps": 0.3}},
        "objective": {"class_path": "FastBAT", "init_args": {"step_size": 5.0}},
    }
    wrap_data = staticmethod(in_a_box)


# -- a host with BatchNorm and images ----------------------------------------------------------------------------------
class Images(pl.LightningModule):
    def __init__(self, batch_norm: bool = False, network: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        norm = [nn.BatchNorm2d(4)] if batch_norm else []
        self.net = network or nn.Sequential(
            nn.Conv2d(1, 4, 3), *norm, nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, 3)
        )
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("mine", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images(rows: int = 24, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 3)


def fit(host, callbacks=(), batches: int = 3, data=None, **settings: Any):
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=batches, callbacks=list(callbacks), **{**QUIET, **settings})
    trainer.fit(host, data or DataLoader(images(), batch_size=8))
    return host, trainer


OBJECTIVES = [
    "standard",
    "clean_and_adversarial",
    "fast",
    "trades",
    "mart",
    "fast_bat",
    "grad_align",
]


@pytest.mark.parametrize("objective", ["standard", "fast", "trades", "fast_bat"])
def test_without_budget_it_is_natural_training(objective):
    plain, _ = fit(Images())
    attack = PGD(eps=0.0, step_size=0.1) if objective in ("standard", "trades") else FastFGSM(eps=0.0, step_size=0.1)
    ours, _ = fit(Images(), [AdversarialTraining(attack, objective)])
    exact = objective in ("standard", "fast")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0.0, atol=0.0 if exact else 1e-6)


def test_grad_align_without_coefficient_or_budget_is_natural_training():
    plain, _ = fit(Images())
    ours, _ = fit(Images(), [AdversarialTraining(FGSM(eps=0.0), GradAlign(coef=0.5))])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0.0, atol=1e-6)


def test_clean_weight_one_without_budget_is_twice_the_natural_gradient():
    class Kept(Images):
        def on_before_optimizer_step(self, optimizer):
            self.kept = [parameter.grad.clone() for parameter in self.parameters()]

    plain, _ = fit(Kept(), batches=1)
    ours, _ = fit(Kept(), [AdversarialTraining(PGD(eps=0.0), CleanAndAdversarial(1.0))], batches=1)
    for one, two in zip(plain.kept, ours.kept, strict=True):
        assert torch.equal(2.0 * one, two)


def gradients_of(host, callback, precision: str = "64-true"):
    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters()}

    keep = Keep()
    data = TensorDataset(*(column.double() if column.is_floating_point() else column for column in images(8).tensors))
    fit(host, [callback, keep], batches=1, data=DataLoader(data, batch_size=8), precision=precision)
    return keep.found, data.tensors


def crafted_by(callback, host, inputs, targets):
    """What the callback crafts in the first step, from the same stream."""
    draws = callback.random.samples(len(inputs), "attack", 0)
    return callback.objective.craft(
        Crafting(callback.attack, host.net, inputs, targets, InputSpace(), draws, check=True)
    )


@pytest.mark.parametrize("objective", [TRADES(2.0), MART(3.0), StandardAT(), CleanAndAdversarial(0.5)])
def test_gradient_is_that_of_the_formula(objective):
    host = Images()
    callback = AdversarialTraining(PGD(eps=0.1, steps=3), objective, seed=5)
    twin = copy.deepcopy(host).double()
    found, (x, y) = gradients_of(host, callback)
    adversarial = crafted_by(callback, twin, x, y)
    assert (adversarial - x).abs().max() <= 0.1 + 1e-6
    clean, moved = twin.net(x), twin.net(adversarial)
    formula = {
        "TRADES": lambda: (
            F.cross_entropy(clean, y)
            + 2.0 * (clean.softmax(1) * (clean.log_softmax(1) - moved.log_softmax(1))).sum(1).mean()
        ),
        "MART": lambda: mart_loss(clean, moved, y, 3.0),
        "StandardAT": lambda: F.cross_entropy(moved, y),
        "CleanAndAdversarial": lambda: F.cross_entropy(moved, y) + 0.5 * F.cross_entropy(clean, y),
    }[type(objective).__name__]()
    for (name, _), expected in zip(
        twin.named_parameters(), torch.autograd.grad(formula, list(twin.parameters())), strict=True
    ):
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_trades_attack_raises_the_divergence():
    host, (x, y) = Images(), images(8).tensors
    callback = AdversarialTraining(PGD(eps=0.1, steps=5), "trades")
    assert (callback.attack.loss, callback.attack.random_start) == ("kl", "gaussian")
    adversarial = crafted_by(callback, host, x, y)
    start = x + 0.001 * torch.randn_like(x)
    clean = host.net(x)
    assert trades_kl(clean, host.net(adversarial)) > 100 * trades_kl(clean, host.net(start))


# -- closed forms ------------------------------------------------------------------------------------------------------
def test_mart_loss_by_hand():
    clean, moved = torch.tensor([[2.0, 0.0, 1.0]]).double(), torch.tensor([[0.5, 1.0, 0.0]]).double()
    p, q = (F.softmax(each, dim=1)[0] for each in (clean, moved))
    boosted = -q[0].log() - (1.0001 - max(q[1], q[2]) + 1e-12).log()
    weight = 1.0000001 - p[0]
    expected = boosted + 5.0 * (p * (p / q).log()).sum() * weight
    torch.testing.assert_close(mart_loss(clean, moved, torch.tensor([0])), expected)


def test_losses_by_finite_differences():
    torch.manual_seed(0)
    clean, moved = torch.randn(4, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    targets = torch.tensor([0, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda a, b: mart_loss(a, b, targets, 2.0), (clean, moved))
    assert torch.autograd.gradcheck(trades_kl, (clean, moved))


class OneWeight(nn.Module):
    """Logits (theta * x, 0): one input, one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        return torch.cat([self.theta * x, torch.zeros_like(x)], dim=1)


def test_fast_bat_cross_term_by_hand():
    """On f = theta x with label 0: L = log(1 + exp(-theta x)), so h = -theta s with s = sigmoid(-theta x)."""
    x, y = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])

    class Host(Images):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    host = Host(network=OneWeight())
    callback = AdversarialTraining(FastFGSM(eps=0.3), FastBAT(lmbda=4.0, step_size=0.1), seed=1)

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.found = pl_module.net.theta.grad.item()

    keep = Keep()
    data = DataLoader(TensorDataset(x, y), batch_size=1)
    fit(host, [callback, keep], batches=1, data=data, precision="64-true")

    theta = 0.7
    u = callback.random.samples(1, "attack", 0).uniform(1).double().item()
    sigmoid = lambda value: 1.0 / (1.0 + torch.exp(torch.tensor(-value, dtype=torch.float64)).item())  # noqa: E731
    start = 0.5 + (2.0 * u - 1.0) * 0.3
    slope = lambda place: -theta * sigmoid(-theta * place)  # noqa: E731
    z = min(max(start + 0.1 * slope(start), 0.2), 0.8)
    d = min(max(z + 0.1 * slope(z), 0.2), 0.8)
    inside = float(0.2 + 1e-7 < d < 0.8 - 1e-7)
    s = sigmoid(-theta * z)
    # dh/dtheta = -s + theta z s (1 - s)
    cross = (-s + theta * z * s * (1 - s)) * inside * slope(d) / 4.0
    assert keep.found == pytest.approx(-d * sigmoid(-theta * d) + cross, rel=1e-5)
    assert abs(cross) > 1e-3


def test_fast_bat_with_a_large_lambda_trains_on_its_point():
    gradients = []
    for lmbda in (1e12, 1e9):
        host = Images()
        callback = AdversarialTraining(FastFGSM(eps=0.1), FastBAT(lmbda=lmbda, step_size=2.0), seed=2)
        twin = copy.deepcopy(host).double()
        found, (x, y) = gradients_of(host, callback)
        gradients.append(found)
        adversarial = crafted_by(callback, twin, x, y)
        expected = torch.autograd.grad(F.cross_entropy(twin.net(adversarial), y), list(twin.parameters()))
        for (name, _), value in zip(twin.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_grad_align_term_by_hand():
    host = Images()
    callback = AdversarialTraining(FGSM(eps=0.1), GradAlign(coef=0.7), seed=4)
    twin = copy.deepcopy(host).double()
    found, (x, y) = gradients_of(host, callback)
    adversarial = crafted_by(callback, twin, x, y)
    eta = (2.0 * callback.random.samples(8, "attack", 0).stream("eta").uniform(1, 8, 8) - 1.0) * 0.1
    loss = F.cross_entropy(twin.net(adversarial), y)
    grads = []
    for place in (x, x + eta):
        place = place.float().double().requires_grad_()
        each = F.cross_entropy(twin.net(place), y, reduction="sum")
        grads.append(torch.autograd.grad(each, place, create_graph=True)[0].flatten(1))
    loss = loss + 0.7 * (1.0 - F.cosine_similarity(*grads, dim=1)).mean()
    for (name, _), value in zip(
        twin.named_parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True
    ):
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


# -- what a user's run keeps -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_logs_the_hosts_own(objective):
    host, trainer = fit(Images(batch_norm=True), [AdversarialTraining(objective=objective)])
    assert "mine" in trainer.callback_metrics
    assert trainer.global_step == 3
    assert all(torch.isfinite(parameter).all() for parameter in host.parameters())
    assert all(module.training for module in host.net.modules())


@pytest.mark.parametrize(("which", "moves"), [("both", 2), ("adv", 1), ("clean", 1)])
@pytest.mark.parametrize("objective", ["trades", "mart", "clean_and_adversarial"])
def test_batchnorm_statistics_move_with_the_passes_that_count(objective, which, moves):
    host, _ = fit(Images(batch_norm=True), [AdversarialTraining(objective=objective, bn_update=which)])
    assert host.net[1].num_batches_tracked == 3 * moves


def test_attack_leaves_statistics_alone():
    host, _ = fit(Images(batch_norm=True), [AdversarialTraining(PGD(eps=0.1, steps=4))])
    assert host.net[1].num_batches_tracked == 3
    for mode in ("eval", "batch"):
        host, _ = fit(Images(batch_norm=True), [AdversarialTraining(PGD(eps=0.1, steps=4, batch_norm=mode))])
        assert host.net[1].num_batches_tracked == 3


def test_start_epoch_and_schedule():
    seen = []

    class Watches(Images):
        def training_step(self, batch, batch_idx):
            seen.append((batch[0] - images().tensors[0][8 * batch_idx : 8 * batch_idx + 8]).abs().max().item())
            return super().training_step(batch, batch_idx)

    schedule = LinearWarmup(0.0, 0.2, epochs=2)
    callback = AdversarialTraining(FGSM(eps=0.2), start_epoch=1, eps_schedule=schedule)
    trainer = pl.Trainer(max_epochs=3, callbacks=[callback], **QUIET)
    trainer.fit(Watches(), DataLoader(images(), batch_size=8))
    assert seen[:3] == [0.0, 0.0, 0.0]
    assert seen[3:] == pytest.approx([0.1, 0.1 + 0.1 / 3, 0.1 + 0.2 / 3, 0.2, 0.2, 0.2], abs=1e-6)


def test_schedule_of_a_radius_that_the_attack_does_not_have():
    callback = AdversarialTraining(MSD(steps=1), eps_schedule=LinearWarmup(0.0, 0.2, epochs=2))
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    with pytest.raises(MisconfigurationException, match=r"`eps_schedule` sets the radius `eps` .* but MSD has none"):
        trainer.fit(Images(), DataLoader(images(), batch_size=8))


def test_normalised_data_are_attacked_in_raw_units():
    class Normalised(pl.LightningDataModule):
        input_space = InputSpace(mean=(0.5,), std=(0.25,))

        def train_dataloader(self):
            x, y = images().tensors
            return DataLoader(TensorDataset((x - 0.5) / 0.25, y), batch_size=8)

    class Watches(Images):
        def training_step(self, batch, batch_idx):
            x = images().tensors[0][8 * batch_idx : 8 * batch_idx + 8]
            raw = batch[0] * 0.25 + 0.5
            assert (raw - x).abs().max().item() == pytest.approx(0.1, abs=1e-5)
            assert raw.min() >= -1e-6
            assert raw.max() <= 1.0 + 1e-6
            return super().training_step(batch, batch_idx)

    fit(Watches(), [AdversarialTraining(PGD(eps=0.1, steps=3))], data=Normalised())


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_radius_in_bytes_is_refused_before_training():
    with pytest.raises(
        ValueError, match=r"`eps` to be in the units of the inputs, in \[0, 1\], but got 8. Did you mean"
    ):
        fit(Images(), [AdversarialTraining(PGD(eps=8))])


def test_inputs_outside_the_box_point_to_the_space():
    x, y = images().tensors
    outside = DataLoader(TensorDataset(4.0 * x - 2.0, y), batch_size=8)
    with pytest.raises(ValueError, match=r"lie in \[0.0, 1.0\] in raw units.*InputSpace"):
        fit(Images(), [AdversarialTraining()], data=outside)


def test_unknown_objective_is_refused():
    with pytest.raises(ValueError, match=r"`objective` to be one of \['standard'.*but got 'tradez'"):
        AdversarialTraining(objective="tradez")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"start_epoch": -1}, "`start_epoch`"), ({"bn_update": "none"}, "`bn_update`")],
)
def test_arguments_out_of_range(arguments, words):
    with pytest.raises(ValueError, match=words):
        AdversarialTraining(**arguments)
    for kind in (TRADES, MART, CleanAndAdversarial, GradAlign):
        with pytest.raises(ValueError, match=r"at least 0, but got -1"):
            kind(-1.0)
    with pytest.raises(ValueError, match=r"`lmbda` to be positive, but got 0"):
        FastBAT(lmbda=0.0)


def test_host_that_calls_its_network_twice_is_told():
    class Twice(Images):
        def training_step(self, batch, batch_idx):
            self.net(batch[0])
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match=r"Twice.training_step` to call its network .* 2 times"):
        fit(Twice(), [AdversarialTraining(objective="trades")])


def test_network_without_logits_is_told():
    class Features(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(1, 4, 3)
            self.head = nn.Linear(4 * 36, 3)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(self.body(batch[0]).flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"Conv2d to put out logits of shape \(8, K\).*`network`"):
        fit(Features(), [AdversarialTraining(PGD(eps=0.1), "trades", network="body")])


def test_values_that_are_not_finite_end_the_run():
    class Explodes(Images):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                with torch.no_grad():
                    self.net[0].weight.fill_(torch.nan)
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"PGD got NaN or infinite gradients in epoch 0"):
        fit(Explodes(), [AdversarialTraining(PGD(eps=0.1))])


def test_two_attacks_in_one_run_are_refused():
    with pytest.raises(MisconfigurationException, match="both want to perturb the inputs"):
        fit(Images(), [AdversarialTraining(), AdversarialTraining(name="second")])
