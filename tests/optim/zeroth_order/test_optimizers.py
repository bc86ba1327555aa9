"""Optimizers that ask for losses: against torch's on the same gradient, and against their formulas."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.core.randomness import derived_seed
from lightning_trust.optim import (
    CGE,
    RGE,
    ZOSGD,
    ZOSVRG,
    LossOracle,
    MeZO,
    ZOAdam,
    ZOConservative,
    ZOSignSGD,
)
from lightning_trust.optim.zeroth_order.directions import SeededDirections


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


X = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
Y = torch.arange(9) % 3


def loss_of(net):
    return lambda: F.cross_entropy(net(X), Y)


def states_equal(first, second, **tolerance):
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


@pytest.mark.parametrize(
    ("own", "peer", "settings"),
    [
        (ZOSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
        (ZOSGD, torch.optim.SGD, {"lr": 0.1}),
        (ZOAdam, torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.01}),
    ],
)
@pytest.mark.parametrize("estimator", [RGE(q=2), CGE()], ids=["rge", "cge"])
def test_steps_are_those_of_torch_on_the_same_gradient(own, peer, settings, estimator):
    net, twin = network(), network()
    optimizer = own(net.parameters(), estimator=estimator, module=net, seed=4, **settings)
    expected = peer(twin.parameters(), **settings)
    for step in range(5):
        shown = optimizer.step(loss_of(net))
        expected.zero_grad()
        seed = derived_seed(4, "step", step)
        found = estimator.add(LossOracle(loss_of(twin), list(twin.parameters()), twin, twin, seed=seed))
        expected.step()
        assert shown == found.loss
        states_equal(net, twin)


def test_elementwise_signs():
    net, twin = network(), network()
    optimizer = ZOSignSGD(net.parameters(), lr=0.01, estimator=CGE(central=True), rule="elementwise", module=net)
    optimizer.step(loss_of(net))
    gradients = torch.autograd.grad(loss_of(twin)(), list(twin.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
            parameter.sub_(0.01 * gradient.sign())
    states_equal(net, twin)


def test_signs_of_derivatives():
    net, twin = network(), network()
    ZOSignSGD(net.parameters(), lr=0.01, estimator=RGE(q=3), seed=4).step(loss_of(net))
    parameters = dict(enumerate(twin.parameters()))
    slopes = RGE(q=3).slopes(LossOracle(loss_of(twin), list(parameters.values()), seed=derived_seed(4, "step", 0)))
    assert set(slopes.values.sign().tolist()) <= {-1.0, 1.0}
    for seed, sign in zip(slopes.seeds, slopes.values.sign().tolist(), strict=True):
        slopes.directions.move(seed, -0.01 * sign / 3)
    states_equal(net, twin, rtol=0.0, atol=1e-12)


def test_conservative_steps_never_raise_the_loss():
    net = network()
    optimizer = ZOConservative(net.parameters(), lr=0.5, seed=1)
    loss = loss_of(net)
    values = [float(loss())]
    for _ in range(60):
        optimizer.step(loss)
        values.append(float(loss()))
        assert values[-1] == float(optimizer.last.loss)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert values[-1] < 0.9 * values[0]
    # with a rate that overshoots both ways the weights stay bit for bit
    before = copy.deepcopy(net)
    ZOConservative(net.parameters(), lr=1e4, seed=1).step(loss)
    states_equal(net, before)


def test_conservative_step_picks_the_best_of_three():
    weight = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    # the estimate points up the slope; a step against it leaps over the minimum, one along it finds another
    loss = lambda: torch.where(weight < 1.5, weight.square(), (weight - 3.0).square() - 1.0).sum()  # noqa: E731
    ZOConservative([weight], lr=1.0, estimator=CGE(central=True)).step(loss)
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0], dtype=torch.float64))


def test_svrg_at_its_anchor_steps_along_the_whole_gradient():
    net, twin = network(), network()
    optimizer = ZOSVRG(net.parameters(), lr=0.1, estimator=RGE(q=2), epoch_len=1, seed=2)
    halves = [lambda s=s: F.cross_entropy(net(X[s]), Y[s]) for s in (slice(0, 4), slice(4, 8))]
    optimizer.anchored_on(lambda: halves)
    optimizer.step(lambda: F.cross_entropy(net(X[:3]), Y[:3]))
    seed = derived_seed(2, "step", 0)
    for place, rows in enumerate((slice(0, 4), slice(4, 8))):
        own = derived_seed(seed, "anchor", place)
        loss = lambda rows=rows: F.cross_entropy(twin(X[rows]), Y[rows])  # noqa: E731
        RGE(q=2).add(LossOracle(loss, list(twin.parameters()), seed=own), scale=0.5)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.sub_(0.1 * parameter.grad)
    states_equal(net, twin, rtol=0.0, atol=1e-12)


def test_svrg_must_know_its_anchor():
    net = network()
    with pytest.raises(MisconfigurationException, match="was not told on which"):
        ZOSVRG(net.parameters()).step(loss_of(net))


# -- MeZO --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("q", [1, 3])
def test_mezo_is_sgd_on_the_estimate_that_it_does_not_store(q):
    net, twin = network(), network()
    optimizer = MeZO(net.named_parameters(), lr=0.1, q=q, weight_decay=0.2, seed=4)
    for step in range(4):
        optimizer.step(loss_of(net))
        twin.zero_grad()
        oracle = LossOracle(loss_of(twin), dict(twin.named_parameters()), seed=derived_seed(4, "step", step))
        RGE(q=q).add(oracle)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                decay = 0.0 if "bias" in name else 0.2
                parameter.copy_((1.0 - 0.1 * decay) * parameter - 0.1 * parameter.grad)
        states_equal(net, twin, rtol=0.0, atol=1e-12)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_mezo_draws_a_direction_three_times(monkeypatch):
    """Restoring and updating are one pass."""
    moves = []
    own = SeededDirections.move
    monkeypatch.setattr(SeededDirections, "move", lambda self, *a, **k: (moves.append(a), own(self, *a, **k))[1])
    net = network()
    MeZO(net.parameters()).step(loss_of(net))
    assert len(moves) == 3


def test_mezo_groups_and_frozen_parameters():
    net = network()
    net[0].bias.requires_grad_(False)
    before = copy.deepcopy(net)
    groups = [{"params": list(net[0].parameters()), "lr": 0.0}, {"params": list(net[2].parameters()), "lr": 0.1}]
    MeZO(groups).step(loss_of(net))
    torch.testing.assert_close(net[0].weight, before[0].weight, rtol=0.0, atol=1e-15)
    assert torch.equal(net[0].bias, before[0].bias)
    assert (net[2].weight - before[2].weight).abs().max() > 1e-4


def test_mezo_puts_the_weights_back_where_the_loss_is_no_number():
    net = network()
    before = copy.deepcopy(net)
    calls = []

    def loss():
        calls.append(1)
        return loss_of(net)() * (torch.nan if len(calls) == 4 else 1.0)

    optimizer = MeZO(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got nan along the direction of the step \(mu=0.001\)"):
        optimizer.step(loss)
    states_equal(net, before, rtol=0.0, atol=1e-12)


# -- states and bad input ----------------------------------------------------------------------------------------------
MAKERS = {
    "mezo": lambda net: MeZO(net.named_parameters(), lr=0.05, seed=3),
    "zo_sgd": lambda net: ZOSGD(net.parameters(), lr=0.05, momentum=0.9, seed=3),
    "zo_adam": lambda net: ZOAdam(net.parameters(), lr=0.05, seed=3),
    "zo_sign": lambda net: ZOSignSGD(net.parameters(), lr=0.05, seed=3),
    "zo_conservative": lambda net: ZOConservative(net.parameters(), lr=0.05, seed=3),
    "zo_svrg": lambda net: ZOSVRG(net.parameters(), lr=0.05, epoch_len=3, seed=3),
}


def made(name, net):
    optimizer = MAKERS[name](net)
    if isinstance(optimizer, ZOSVRG):
        optimizer.anchored_on(lambda: [loss_of(net)])
    return optimizer


@pytest.mark.parametrize("name", list(MAKERS))
def test_resumed_from_a_state_dict_equals_uninterrupted(name, tmp_path):
    net = network()
    optimizer = made(name, net)
    for step in range(5):
        if step == 2:
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        optimizer.step(loss_of(net))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = network()
    resumed = made(name, other)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    for _ in range(3):
        resumed.step(loss_of(other))
    states_equal(net, other)


@pytest.mark.parametrize("name", list(MAKERS))
def test_pickles_and_works_with_a_schedule(name):
    net = network()
    optimizer = made(name, net)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step(loss_of(net))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.steps_taken == 1
    before = copy.deepcopy(net)
    optimizer.step(loss_of(net))
    moved = max((p - q).abs().max().item() for p, q in zip(net.parameters(), before.parameters(), strict=True))
    assert moved > 0.0


def test_a_closure_that_differs_is_refused():
    net = network()
    generator = torch.Generator().manual_seed(1)

    def loss():
        rows = torch.randint(9, (4,), generator=generator)
        return F.cross_entropy(net(X[rows]), Y[rows])

    with pytest.raises(ValueError, match=r"evaluated twice at the same weights, .* a stochastic closure"):
        MeZO(net.parameters()).step(loss)
    with pytest.raises(ValueError, match=r"`closure` of MeZO.step to evaluate the loss, but got None"):
        MeZO(net.parameters()).step()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: MeZO(p, lr=-1.0), "`lr` to be a number in"),
        (lambda p: MeZO(p, mu=0.0), "`mu` to be a positive number, but got 0.0"),
        (lambda p: MeZO(p, q=0), "`q` to be an integer of at least 1, but got 0"),
        (lambda p: ZOSGD(p, momentum=1.5), "`momentum` to be a number in"),
        (lambda p: ZOSignSGD(p, rule="both"), "`rule` to be 'scalar' or 'elementwise', but got 'both'"),
        (lambda p: ZOSVRG(p, epoch_len=0), "`epoch_len` to be an integer of at least 1, but got 0"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make(network().parameters())


def test_scalar_signs_need_directions():
    with pytest.raises(MisconfigurationException, match="its estimator must be an RGE, but got CGE"):
        ZOSignSGD(network().parameters(), estimator=CGE())
