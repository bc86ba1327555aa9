"""AdvMoE: against a loop by hand, the freezing of either player, limit cases, ranks, bad input."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_trust.callbacks import AdvMoE
from lightning_trust.core.schedules import Steps
from lightning_trust.core.space import InputSpace
from lightning_trust.nn import MoEConv2d, MoENetwork, Router, RoutingContext, SmallCNN, convert_to_moe
from tests import conformance
from tests.two_ranks import QUIET, fit_on_two_ranks


# -- conformance -------------------------------------------------------------------------------------------------------
class MoEHost(conformance.Host):
    """The user's module with a network of experts on rows of six numbers, seen as images of two by three."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.05) -> None:
        super().__init__(dropout, lr)
        context = RoutingContext()
        network = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            MoEConv2d(1, 4, 2, num_experts=2, context=context),
            nn.Tanh(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(8, conformance.CLASSES),
        )
        self.net = MoENetwork(network, nn.Linear(6, 2), 2, context)


def in_a_box(data):
    data.input_space = InputSpace(-8.0, 8.0)
    return data


class TestTrades(conformance.CallbackConformance):
    callback = AdvMoE
    host = MoEHost
    arguments: ClassVar = {"eps": 0.3, "step_size": 0.2, "beta": 3.0, "balance_weight": 0.1}
    wrap_data = staticmethod(in_a_box)


class TestClassMod(conformance.CallbackConformance):
    callback = AdvMoE
    host = MoEHost
    arguments: ClassVar = {"eps": 0.3, "step_size": 0.2, "router_objective": "class_mod", "router_lr": 0.02}
    wrap_data = staticmethod(in_a_box)


# -- a host with images ------------------------------------------------------------------------------------------------
class Images(pl.LightningModule):
    def __init__(self, batch_norm: bool = False, network: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = network or convert_to_moe(SmallCNN(1, 4, widths=(4, 8), batch_norm=batch_norm), router=router())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def router() -> Router:
    """Without statistics of the batch, so that ranks and a loop by hand agree to the last digit."""
    return Router(2, 1, widths=(8,), blocks=(1,), norm="group")


def images(rows: int = 24, seed: int = 0) -> TensorDataset:
    """Four classes, one in each corner."""
    generator = torch.Generator().manual_seed(seed)
    x, y = 0.4 * torch.rand(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 4
    for place, target in enumerate(y.tolist()):
        row, column = divmod(target, 2)
        x[place, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.6
    return TensorDataset(x, y)


def doubled(host: Images) -> Images:
    """In float64, for the attack takes signs, and those of gradients near zero are of rounding."""
    return host.double()


def fit(host, *callbacks, batches: int = 3, epochs: int = 1, rows: int = 24, **settings):
    x, y = images(rows).tensors
    trainer = pl.Trainer(
        max_epochs=epochs, limit_train_batches=batches, callbacks=list(callbacks), **{**QUIET, **settings}
    )
    x = x.to(next(host.parameters()).dtype)
    trainer.fit(host, DataLoader(TensorDataset(x, y), batch_size=8))
    return host, trainer


def states(host):
    moe = host.net
    return tuple(
        {name: value.clone() for name, value in part.state_dict().items()} for part in (moe.network, moe.router)
    )


def equal(first, second) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


# -- against a loop by hand --------------------------------------------------------------------------------------------
def divergence(p_logits, q_logits):
    p = p_logits.softmax(1)
    return (p * (p_logits.log_softmax(1) - q_logits.log_softmax(1))).sum(1)


def attacked(moe, x, draws, eps, size, steps, weight):
    moe.eval()
    with torch.no_grad():
        logits, scores = moe.forward_with_scores(x)
    moved = (x + 0.001 * draws.normal(1, 8, 8)).clamp(0, 1)
    for _ in range(steps):
        moved.requires_grad_()
        out, routed = moe.forward_with_scores(moved)
        value = divergence(logits, out).sum() + weight * divergence(scores, routed).sum()
        (gradient,) = torch.autograd.grad(value, moved)
        moved = torch.max(torch.min(moved.detach() + size * gradient.sign(), x + eps), x - eps).clamp(0, 1)
    moe.train()
    return moved


@pytest.mark.parametrize("objective", ["trades", "class_mod"])
def test_three_steps_equal_a_loop_by_hand(objective):
    settings = {"eps": 0.1, "step_size": 0.06, "steps": 2, "beta": 4.0, "router_attack_weight": 0.5}
    callback = AdvMoE(**settings, router_objective=objective, alpha=2.0, balance_weight=0.3, seed=5)
    host, _ = fit(doubled(Images()), callback, epochs=2, batches=2)

    twin = doubled(Images())
    moe, beta = twin.net, 4.0
    pathways = torch.optim.SGD(moe.network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    own = torch.optim.SGD(moe.router.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    step = 0
    for epoch in range(2):
        own.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * epoch / 2))
        for place in range(2):
            x, y = images()[8 * place : 8 * place + 8]
            x = x.double()
            moved = attacked(moe, x, callback.random.samples(8, "attack", step), 0.1, 0.06, 2, 0.5)
            clean = moe(x)
            loss = F.cross_entropy(clean, y) + beta * divergence(clean, moe(moved)).mean()
            pathways.zero_grad()
            loss.backward()
            pathways.step()

            moved = attacked(moe, x, callback.random.samples(8, "router", step), 0.1, 0.06, 2, 0.5)
            moe.dispatch = "mask"
            (clean, scores), (other, routed) = moe.forward_with_scores(x), moe.forward_with_scores(moved)
            moe.dispatch = "group"
            if objective == "trades":
                loss = F.cross_entropy(clean, y) + beta * divergence(clean, other).mean()
            else:
                loss = 2.0 * F.cross_entropy(scores, y % 2) + beta * divergence(scores, routed).mean()
            shares = torch.bincount(scores.argmax(1), minlength=2) / 8
            loss = loss + 0.3 * 2 * (shares * scores.softmax(1).mean(0)).sum()
            own.zero_grad()
            loss.backward()
            own.step()
            step += 1
    for name, value in moe.state_dict().items():
        torch.testing.assert_close(host.net.state_dict()[name], value, rtol=0.0, atol=1e-8, msg=name)
    assert not equal(states(host)[1], states(doubled(Images()))[1])


# -- freezing ----------------------------------------------------------------------------------------------------------
class Watch(Callback):
    def __init__(self) -> None:
        self.seen: dict[str, list] = {"start": [], "end": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen["start"].append(states(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen["end"].append(states(pl_module))


@pytest.mark.parametrize("objective", ["trades", "class_mod"])
def test_each_player_stands_still_while_the_other_moves(objective):
    """Buffers too, of a router with BatchNorm as well."""
    torch.manual_seed(1)
    normed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    network = convert_to_moe(SmallCNN(1, 4, widths=(4, 8)), router=normed)
    before, after = Watch(), Watch()
    fit(Images(network=network), before, AdvMoE(eps=0.1, router_objective=objective), after)
    assert len(before.seen["end"]) == 3
    for start, middle, end in zip(before.seen["start"], before.seen["end"], after.seen["end"], strict=True):
        assert equal(start[1], middle[1])
        assert equal(middle[0], end[0])
        assert not equal(start[0], middle[0])
        assert not equal(middle[1], end[1])


def test_router_steps_once_a_step_of_the_pathways():
    before, after = Watch(), Watch()
    fit(Images(), before, AdvMoE(eps=0.1), after, batches=4, rows=32, accumulate_grad_batches=2)
    moved = [not equal(b[1], a[1]) for b, a in zip(before.seen["end"], after.seen["end"], strict=True)]
    assert moved == [False, True, False, True]


# -- limit cases -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_without_radius_and_router_steps_it_is_training_of_the_routed_network(beta):
    host, _ = fit(Images(batch_norm=beta == 0.0), AdvMoE(eps=0.0, beta=beta, router_lr=0.0))
    plain = Images(batch_norm=beta == 0.0)
    plain.net.router.requires_grad_(False)
    fit(plain)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(host.state_dict()[name], value, rtol=0.0, atol=1e-6, msg=name)


def test_router_of_two_mixtures_learns_which_expert_is_whose():
    callback = AdvMoE(eps=0.05, step_size=0.03, router_objective="class_mod", router_lr=0.02)
    host, trainer = fit(Images(), callback, epochs=8, batches=8, rows=64)
    x, y = images(64, seed=9).tensors
    assert (host.net.route(x).argmax(1) == y % 2).float().mean() > 0.95
    shares = [float(trainer.callback_metrics[f"trust/expert_share/{expert}"]) for expert in range(2)]
    assert shares == pytest.approx([0.5, 0.5], abs=0.02)
    assert float(trainer.callback_metrics["trust/router_agreement"]) > 0.95


def test_experts_without_images_are_told_once(recwarn):
    host = Images()
    # scores that no step of the router can bring near each other
    with torch.no_grad():
        host.net.router.scores.bias.copy_(torch.tensor([-1e6, 1e6]))
    fit(host, AdvMoE(eps=0.05, router_lr=1e-6), epochs=3)
    said = [str(each.message) for each in recwarn if "sent 100.0 % of the images to expert 1" in str(each.message)]
    assert len(said) == 1
    assert said[0].startswith("In epoch 0 the router of AdvMoE")
    recwarn.clear()
    # both experts at work
    fit(Images(), AdvMoE(eps=0.05, router_objective="class_mod", router_lr=0.02), epochs=2, batches=8, rows=64)
    assert not [each for each in recwarn if "of the images to expert" in str(each.message)]


def test_schedule_scales_the_learning_rate():
    callback = AdvMoE(eps=0.05, router_lr=0.2, router_schedule=Steps([1.0, 0.1], milestones=[1]))
    fit(Images(), callback, epochs=2)
    assert callback.state()["router"]["param_groups"][0]["lr"] == pytest.approx(0.02)


# -- the host and ranks ------------------------------------------------------------------------------------------------
def test_left_over_gradients_of_the_router_do_not_move_it():
    host = Images()
    for parameter in host.net.router.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = states(host)[1]
    fit(host, AdvMoE(eps=0.1, router_lr=0.0))
    assert equal(before, states(host)[1])
    assert all(parameter.requires_grad for parameter in host.parameters())


class TwoRankData(pl.LightningDataModule):
    def train_dataloader(self):
        x, y = images().tensors
        rows = TensorDataset(x.double(), y)
        if not torch.distributed.is_initialized():
            return DataLoader(rows, batch_size=8)
        return DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, shuffle=False))


@pytest.mark.parametrize("objective", ["trades", "class_mod"])
def test_two_ranks_equal_one_without_find_unused_parameters(tmp_path, objective):
    """Also where an expert gets no image on one rank."""

    def callback():
        return AdvMoE(eps=0.1, router_objective=objective, balance_weight=0.5, seed=1)

    first, second = fit_on_two_ranks(tmp_path, doubled(Images()), TwoRankData(), [callback()], max_epochs=1)
    host = doubled(Images())
    pl.Trainer(max_epochs=1, callbacks=[callback()], **QUIET).fit(host, datamodule=TwoRankData())
    for name, value in host.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0.0, atol=1e-5, msg=name)


def test_two_ranks_with_batchnorm_stay_equal_where_one_expert_is_unused(tmp_path):
    """BatchNorm of the pathways and of the router."""
    torch.manual_seed(4)
    normed = convert_to_moe(SmallCNN(1, 4, widths=(4, 8)), router=Router(2, 1, widths=(8,), blocks=(1,)))
    host = doubled(Images(network=normed))
    with torch.no_grad():
        host.net.router.scores.bias.copy_(torch.tensor([50.0, -50.0]))
    first, second = fit_on_two_ranks(tmp_path, host, TwoRankData(), [AdvMoE(eps=0.1)], max_epochs=1)
    assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name)


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"router_objective": "ce"}, "`router_objective` to be 'trades' or 'class_mod', but got 'ce'"),
        ({"beta": -1.0}, "`beta` to be at least 0, but got -1.0"),
        ({"alpha": -1.0}, "`alpha` to be at least 0"),
        ({"router_attack_weight": -1.0}, "`router_attack_weight` to be at least 0"),
        ({"balance_weight": -1.0}, "`balance_weight` to be at least 0"),
        ({"router_lr": -0.1}, "`router_lr` to be at least 0"),
        ({"router_momentum": 1.0}, r"`router_momentum` to be in \[0, 1\), but got 1.0"),
        ({"router_weight_decay": math.nan}, "`router_weight_decay` to be at least 0"),
        ({"steps": 0}, "`steps`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdvMoE(**arguments)


def test_radius_in_units_of_bytes():
    with pytest.raises(ValueError, match="Did you mean 8/255"):
        fit(Images(), AdvMoE(eps=8.0))


def test_network_that_was_not_converted():
    with pytest.raises(MisconfigurationException, match="but the network of Images is a SmallCNN"):
        fit(Images(network=SmallCNN(1, 4)), AdvMoE(eps=0.1))


def test_fewer_classes_than_experts():
    moe = convert_to_moe(SmallCNN(1, 4), num_experts=8, ratio=0.5, router=Router(8, 1))
    with pytest.raises(ValueError, match="at least 8 classes, one an expert, .* but got 4"):
        fit(Images(network=copy.deepcopy(moe)), AdvMoE(eps=0.1, router_objective="class_mod"))
    fit(Images(network=moe), AdvMoE(eps=0.1), batches=1)


def test_targets_of_several_labels():
    rows = TensorDataset(torch.rand(8, 1, 8, 8), torch.zeros(8, 4))
    with pytest.raises(ValueError, match=r"int64 classes of shape \(8,\), but got torch.float32 of shape \(8, 4\)"):
        pl.Trainer(max_epochs=1, callbacks=[AdvMoE(eps=0.1)], **QUIET).fit(Images(), DataLoader(rows, batch_size=8))


def test_manual_optimisation_is_refused():
    host = Images()
    host.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="AdvMoE changes the loss, but Images optimises manually"):
        fit(host, AdvMoE(eps=0.1))
