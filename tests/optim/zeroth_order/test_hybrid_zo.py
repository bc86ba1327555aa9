"""HybridZO: against the optimizers that its phases are, what changes them, and the variance that makes it worth it."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.core.randomness import derived_seed
from lightning_trust.nn import TTLinear
from lightning_trust.optim import CGE, RGE, ZOSGD, HybridZO, LossOracle, SignSCD, ZOSignSGD

X = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
Y = torch.arange(9) % 3


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(TTLinear(4, 6, (2, 2), (3, 2), 2), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(net):
    return lambda: F.cross_entropy(net(X), Y)


def vector(net) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def twins(first, second, steps=6):
    """Both optimizers, made of equal networks with the same seed, take the same steps bit for bit."""
    nets = [network(), network()]
    optimizers = [make(net) for make, net in zip((first, second), nets, strict=True)]
    start = vector(nets[0])
    for _ in range(steps):
        losses = [optimizer.step(loss_of(net)) for optimizer, net in zip(optimizers, nets, strict=True)]
        assert losses[0] == losses[1]
        assert torch.equal(vector(nets[0]), vector(nets[1]))
    assert not torch.equal(vector(nets[0]), start)
    return optimizers[0]


# -- the two phases ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_without_an_end_of_patience_it_is_a_run_of_random_estimates(distribution):
    estimator = RGE(3, 0.01, distribution=distribution, exact_restore=True)
    hybrid = twins(
        lambda net: HybridZO(
            net.parameters(), 0.02, 0.01, 3, distribution=distribution, patience=None, window=1, module=net, seed=4
        ),
        lambda net: ZOSignSGD(net.parameters(), 0.02, estimator, rule="elementwise", module=net, seed=4),
    )
    assert hybrid.phase == "random"
    twins(
        lambda net: HybridZO(
            net.parameters(), 0.02, 0.01, 3, False, distribution, patience=None, window=1, module=net, seed=4
        ),
        lambda net: ZOSGD(net.parameters(), 0.02, estimator, module=net, seed=4),
    )


def from_the_start(net, **settings):
    return HybridZO(net.parameters(), 0.02, 0.01, 3, switch="epoch", switch_epoch=0, module=net, seed=4, **settings)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_from_epoch_0_on_it_is_a_run_of_coordinates(momentum):
    settings = {"coordinate_lr": 0.05, "coordinate_dropout": 0.0, "momentum": momentum}
    hybrid = twins(
        lambda net: from_the_start(net, **settings),
        lambda net: ZOSGD(net.parameters(), 0.05, CGE(0.01, central=True), momentum, module=net, seed=4),
    )
    assert hybrid.phase == "coordinates"


@pytest.mark.parametrize("rule", ["sign", "batch"])
def test_rules_of_the_second_phase_are_those_of_coordinate_descent(rule):
    twins(
        lambda net: from_the_start(net, rule=rule, coordinate_lr=0.05),
        lambda net: SignSCD(net.parameters(), 0.05, rule, module=net, seed=4),
    )


def test_left_out_coordinates_have_no_difference():
    net = network()
    optimizer = from_the_start(net, coordinate_lr=0.05, coordinate_dropout=0.6, momentum=0.0)
    before = vector(net)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(net)(), list(net.parameters()))])
    optimizer.step(loss_of(net))
    moved = vector(net) - before
    kept = moved != 0
    assert 0.2 < kept.double().mean() < 0.6
    torch.testing.assert_close(moved[kept], -0.05 * gradient[kept], rtol=1e-3, atol=1e-5)
    assert optimizer.last.queries == 2 * int(kept.sum()) + 1


# -- the variance that the method is about -----------------------------------------------------------------------------
@pytest.mark.parametrize("q", [1, 5])
def test_error_of_random_estimates_grows_with_the_scalars_in_tensor_train_form(q):
    """Of a quadratic, with normal directions: the squared error is (d + 1) / q times the squared length."""
    torch.manual_seed(1)
    layer = TTLinear(16, 16, (4, 4), (4, 4), rank=1, bias=False).double()
    cores = torch.cat([core.detach().flatten() for core in layer.cores])
    d = len(cores)
    assert d == 32
    assert layer.to_dense().weight.numel() == 256
    matrix = torch.randn(d, d, dtype=torch.float64)
    matrix = matrix + matrix.T

    def loss():
        theta = torch.cat([core.flatten() for core in layer.cores])
        return 0.5 * theta @ matrix @ theta

    gradient, runs = matrix @ cores, 1000 // q
    errors = torch.zeros(runs, dtype=torch.float64)
    for run in range(runs):
        layer.zero_grad()
        RGE(q, 0.1).add(LossOracle(loss, list(layer.cores), seed=run, restores_random_state=True))
        found = torch.cat([core.grad.flatten() for core in layer.cores])
        errors[run] = (found - gradient).square().sum() / gradient.square().sum()
    expected = (d + 1) / q
    assert abs(errors.mean() - expected) < 4 * errors.std() / math.sqrt(runs)
    assert errors.std() / math.sqrt(runs) < 0.08 * expected


# -- what changes the phases -------------------------------------------------------------------------------------------
def test_patience_counts_windows_without_an_improvement():
    net = network()
    values = iter([5.0, 3.0, 4.0, 4.0, 1.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    shown: list[float] = []

    def loss():
        # the value of a step, whatever the weights
        return loss_of(net)() * 0.0 + shown[-1]

    optimizer = HybridZO(net.parameters(), q=1, patience=2, window=2, seed=1)
    optimizer._checked = True
    # means of two steps: 4, 4, 2, 2.5, 2
    phases = []
    for value in values:
        shown.append(value)
        optimizer.step(loss)
        phases.append(optimizer.phase)
    assert phases == ["random"] * 9 + ["coordinates"] * 4


def test_reported_values_take_the_place_of_losses():
    net = network()
    optimizer = HybridZO(net.parameters(), patience=2, window=1, monitor="val_loss", seed=1)
    for _ in range(6):
        optimizer.step(loss_of(net))
    assert optimizer.param_groups[0]["losses"] == 0
    for value in (3.0, 2.0, math.nan, 1.0, 1.0):
        optimizer.report(value)
        assert optimizer.phase == "random"
    optimizer.report(1.5)
    assert optimizer.phase == "coordinates"
    optimizer.report(0.1)
    assert optimizer.phase == "coordinates"


def test_an_epoch_is_told():
    net = network()
    optimizer = HybridZO(net.parameters(), switch="epoch", switch_epoch=2)
    with pytest.raises(MisconfigurationException, match=r"changes its phases with epoch 2, but was not told of any"):
        optimizer.step(loss_of(net))
    phases = []
    for epoch in range(4):
        optimizer.begin_epoch(epoch)
        optimizer.step(loss_of(net))
        phases.append(optimizer.phase)
    assert phases == ["random", "random", "coordinates", "coordinates"]


@pytest.mark.parametrize("rule", ["estimate", "sign"])
def test_a_schedule_works_on_both_rates(rule):
    net = network()
    optimizer = from_the_start(net, rule=rule, coordinate_lr=0.04, coordinate_dropout=0.0, momentum=0.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(net)(), list(net.parameters()))])
    optimizer.step(lambda: loss_of(net)() * 0.0)
    schedule.step()
    before = vector(net)
    optimizer.step(loss_of(net))
    moved = vector(net) - before
    if rule == "estimate":
        torch.testing.assert_close(moved, -0.02 * gradient, rtol=1e-3, atol=1e-5)
    else:
        torch.testing.assert_close(moved.abs().max().item(), 0.02)


def test_trains_a_network_in_tensor_train_form():
    net = network()
    settings = {"patience": 1, "window": 5, "coordinate_lr": 0.05}
    optimizer = HybridZO(net.parameters(), 0.1, 0.01, 5, module=net, seed=2, **settings)
    losses = [optimizer.step(loss_of(net)).item() for _ in range(100)]
    assert optimizer.phase == "coordinates"
    assert losses[0] > 1.0
    assert losses[-1] < 0.1


# -- states ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("after", [3, 5, 7])
@pytest.mark.parametrize("rule", ["estimate", "batch"])
def test_resumed_from_a_state_dict_equals_uninterrupted(rule, after, tmp_path):
    """In the middle of a window, while patience runs out, and in the second phase with its momentum."""

    def made(net):
        # the rate is so large that no window is better than the first
        settings = {"patience": 2, "window": 2, "coordinate_lr": 0.01, "rule": rule}
        return HybridZO(net.named_parameters(), 1.0, 0.01, 2, module=net, seed=3, **settings)

    net = network()
    optimizer = made(net)
    phases = []
    for step in range(10):
        if step == after:
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        optimizer.step(loss_of(net))
        phases.append(optimizer.phase)
    assert phases == ["random"] * 5 + ["coordinates"] * 5
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = network()
    resumed = made(other)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    for step in range(after, 10):
        resumed.step(loss_of(other))
        assert resumed.phase == phases[step]
    assert torch.equal(vector(net), vector(other))
    twin = pickle.loads(pickle.dumps(optimizer))
    assert (twin.phase, twin.steps_taken, twin.module) == ("coordinates", 10, None)


def test_the_same_directions_as_any_random_estimate():
    net, twin = network(), network()
    optimizer = HybridZO(net.parameters(), 0.02, 0.01, 2, False, seed=4)
    optimizer.step(loss_of(net))
    oracle = LossOracle(loss_of(twin), list(twin.parameters()), seed=derived_seed(4, "step", 0))
    found = RGE(2, 0.01).add(oracle)
    assert optimizer.last.queries == found.queries == 4
    grads = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()])
    torch.testing.assert_close(vector(net), vector(network()) - 0.02 * grads, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "`lr` to be a positive number, but got 0.0"),
        ({"coordinate_lr": -1.0}, "`coordinate_lr` to be a positive number, but got -1.0"),
        ({"mu": 0.0}, "`mu` to be a positive number, but got 0.0"),
        ({"q": 0}, "`q` to be an integer of at least 1, but got 0"),
        ({"switch": "step"}, "`switch` to be 'plateau' or 'epoch', but got 'step'"),
        ({"patience": 0}, "`patience` to be an integer of at least 1, but got 0"),
        ({"window": 0}, "`window` to be an integer of at least 1, but got 0"),
        ({"switch_epoch": -1}, "`switch_epoch` to be an integer of at least 0, but got -1"),
        ({"rule": "esti"}, r"`rule` to be one of \['estimate', 'sign', 'batch'\], but got 'esti'"),
        ({"coordinate_dropout": 1.0}, r"`coordinate_dropout` to be a number in \[0, 1\), but got 1.0"),
        ({"momentum": 1.0}, r"`momentum` to be a number in \[0, 1\), but got 1.0"),
        ({"switch": "epoch", "monitor": "val_loss"}, "`monitor` to be None under switch='epoch', but got 'val_loss'"),
        ({"rule": "sign", "coordinates": CGE()}, "`coordinates` to be None under rule='sign', but got CGE"),
        ({"distribution": "cauchy"}, "`distribution` to be one of"),
    ],
)
def test_bad_arguments(settings, words):
    with pytest.raises(ValueError, match=words):
        HybridZO(network().parameters(), **settings)
