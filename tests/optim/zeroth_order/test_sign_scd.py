"""SignSCD: steps along single coordinates that are judged by the loss."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trust.core.randomness import derived_seed
from lightning_trust.nn import TTLinear
from lightning_trust.optim import LossOracle, SignSCD
from lightning_trust.optim.zeroth_order.coordinate_trials import drop_coordinates

X = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
Y = torch.arange(9) % 3


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss_of(net, x=X, y=Y):
    return lambda: F.cross_entropy(net(x), y)


def vector(net) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def loss_at(theta: torch.Tensor) -> float:
    """The loss of the network at weights in a row, by hand."""
    w1, b1, w2, b2 = theta.split([20, 5, 15, 3])
    return float(F.cross_entropy((X @ w1.view(5, 4).T + b1).tanh() @ w2.view(3, 5).T + b2, Y))


@pytest.mark.parametrize("stp", [True, False])
def test_one_after_the_other_is_the_rule_written_out(stp):
    # a rate at which all three cases come up
    net, rate = network(), 0.5
    optimizer = SignSCD(net.parameters(), lr=rate, coordinate_dropout=0.0, stp=stp)
    theta, cases, queries = vector(net), [0, 0, 0], 1
    for _ in range(3):
        optimizer.step(loss_of(net))
        for i in range(len(theta)):
            queries += 1
            here, old = loss_at(theta), theta[i].clone()
            theta[i] = old + rate
            if loss_at(theta) < here:
                cases[0] += 1
                continue
            queries += 1
            theta[i] = old - rate
            if not stp or loss_at(theta) < here:
                cases[1] += 1
                continue
            cases[2] += 1
            theta[i] = old
        torch.testing.assert_close(vector(net), theta, rtol=0.0, atol=1e-15)
        assert optimizer.last.queries == queries
        queries = 1
    assert min(cases[:2]) > 0
    assert bool(cases[2]) == stp


@pytest.mark.parametrize("stp", [True, False])
@pytest.mark.parametrize("vectorised", [True, False])
def test_votes_are_the_rule_written_out(stp, vectorised):
    net, rate = network(), 0.5
    optimizer = SignSCD(
        net.parameters(), rate, "batch", coordinate_dropout=0.0, stp=stp, module=net if vectorised else None
    )
    theta = vector(net)
    seen = set()
    for _ in range(3):
        optimizer.step(loss_of(net))
        here = loss_at(theta)
        votes = torch.zeros_like(theta)
        for i, unit in enumerate(rate * torch.eye(len(theta), dtype=theta.dtype)):
            down = not stp or loss_at(theta - unit) < here
            votes[i] = 1.0 if loss_at(theta + unit) < here else -1.0 if down else 0.0
        seen |= set(votes.tolist())
        theta = theta + rate * votes
        torch.testing.assert_close(vector(net), theta, rtol=0.0, atol=1e-12)
        # in front, behind if need be, and the weights as they are for both, and for what is decided of the ranks
        assert optimizer.last.queries == (1 + stp) * (len(theta) + 1) + 1
    assert seen == ({-1.0, 0.0, 1.0} if stp else {-1.0, 1.0})
    if vectorised:
        assert optimizer.last.equivalent_forwards < optimizer.last.queries


def test_the_loss_of_the_batch_never_rises():
    net = network()
    optimizer = SignSCD(net.parameters(), lr=0.3, seed=2)
    loss = loss_of(net)
    values = [loss().item()]
    for _ in range(30):
        assert float(optimizer.step(loss)) == values[-1]
        values.append(loss().item())
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert values[-1] < 0.5 * values[0]
    # with a step that overshoots both ways the weights stay bit for bit
    before = vector(net)
    SignSCD(net.parameters(), lr=1e3, coordinate_dropout=0.0).step(loss)
    moved = vector(net) != before
    assert not bool(moved.all())


@pytest.mark.parametrize("rule", ["sign", "batch"])
def test_comes_within_a_step_of_the_minimum_of_a_sum_of_absolute_values(rule):
    weight = torch.tensor([1.03, -2.51, 0.0, 0.77], dtype=torch.float64, requires_grad=True)
    optimizer = SignSCD([weight], lr=0.1, rule=rule, seed=1)
    for _ in range(80):
        optimizer.step(lambda: weight.abs().sum())
    assert weight.abs().max() <= 0.1


def test_what_is_left_out_stays_and_is_drawn_from_the_seed():
    net = network()
    before = vector(net)
    optimizer = SignSCD(net.parameters(), lr=1e-3, coordinate_dropout=0.7, stp=False, seed=5)
    optimizer.step(loss_of(net))
    moved = vector(net) != before
    oracle = LossOracle(loss_of(net), list(net.parameters()), seed=derived_seed(5, "step", 0))
    drop_coordinates(oracle, 0.7)
    assert torch.equal(moved, torch.cat([mask.flatten() for mask in oracle.masks.values()]))
    # the share, over many draws
    wide = torch.zeros(40_000, requires_grad=True)
    oracle = LossOracle(lambda: wide.sum(), [wide], masks={"parameters[0]": torch.arange(40_000) % 2 == 0}, seed=5)
    drop_coordinates(oracle, 0.7)
    (mask,) = oracle.masks.values()
    assert not mask[1::2].any()
    assert abs(mask[::2].float().mean() - 0.3) < 4 * (0.21 / 20_000) ** 0.5


def test_groups_have_their_own_steps_and_frozen_weights_stay():
    net = network()
    net[0].bias.requires_grad_(False)
    for rule in ("sign", "batch"):
        before = copy.deepcopy(net)
        groups = [
            {"params": list(net[0].parameters()), "lr": 0.01},
            {"params": [net[2].weight], "lr": 0.02},
            {"params": [net[2].bias], "lr": 0.0},
        ]
        SignSCD(groups, rule=rule, coordinate_dropout=0.0, stp=False, module=net).step(loss_of(net))
        for name, expected in (("0.weight", 0.01), ("2.weight", 0.02), ("0.bias", 0.0), ("2.bias", 0.0)):
            gap = (net.get_parameter(name) - before.get_parameter(name)).abs()
            torch.testing.assert_close(gap, torch.full_like(gap, expected), rtol=0.0, atol=1e-12)
        assert net[0].weight.grad is None


@pytest.mark.parametrize("rule", ["sign", "batch"])
def test_weights_in_tensor_train_form(rule):
    torch.manual_seed(2)
    net = nn.Sequential(TTLinear(4, 6, (2, 2), (3, 2), 2), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = SignSCD(net.parameters(), lr=0.02, rule=rule, module=net, seed=1)
    first = float(optimizer.step(loss_of(net)))
    for _ in range(30):
        optimizer.step(loss_of(net))
    assert loss_of(net)().item() < 0.8 * first


@pytest.mark.parametrize("rule", ["sign", "batch"])
def test_a_loss_that_is_no_number_is_named_and_the_weights_are_put_back(rule):
    net = network()
    before = vector(net)

    def loss():
        return loss_of(net)() + torch.where(net[0].weight[1, 2] > before[6] + 0.05, torch.nan, 0.0)

    optimizer = SignSCD(net.parameters(), lr=0.1, rule=rule, coordinate_dropout=0.0)
    with pytest.raises(ValueError, match=r"got nan at coordinate 6 of 'group 0, parameter 0'"):
        optimizer.step(loss)
    assert torch.equal(vector(net), before)
    with pytest.raises(ValueError, match="got nan at the weights as they are"):
        optimizer.step(lambda: loss_of(net)() * torch.nan)


def test_nothing_left_to_try():
    weight = torch.tensor(1.0, requires_grad=True)
    for rule in ("sign", "batch"):
        for seed in range(8):
            before = weight.detach().clone()
            optimizer = SignSCD([weight], lr=0.1, rule=rule, coordinate_dropout=0.9, seed=seed)
            assert optimizer.step(lambda: weight.square()) == before.square()
            assert abs(weight.item() - before.item()) < 0.11


@pytest.mark.parametrize("rule", ["sign", "batch"])
def test_resumed_from_a_state_dict_equals_uninterrupted(rule, tmp_path):
    net = network()
    optimizer = SignSCD(net.parameters(), 0.05, rule, seed=3)
    for step in range(5):
        if step == 2:
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        optimizer.step(loss_of(net))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = network()
    resumed = SignSCD(other.parameters(), 0.05, rule, seed=3)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    for _ in range(3):
        resumed.step(loss_of(other))
    assert torch.equal(vector(net), vector(other))
    assert pickle.loads(pickle.dumps(optimizer)).steps_taken == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -0.1}, "`lr` to be a number in"),
        ({"rule": "both"}, r"`rule` to be one of \['sign', 'batch'\], but got 'both'"),
        ({"coordinate_dropout": 1.0}, r"`coordinate_dropout` to be a number in \[0, 1\), but got 1.0"),
    ],
)
def test_bad_arguments(settings, words):
    with pytest.raises(ValueError, match=words):
        SignSCD(network().parameters(), **settings)
