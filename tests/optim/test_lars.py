"""LARS: against timm's, and what the formula promises."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.optim import Lars
from torch import nn

from lightning_trust.optim import LARS
from tests.optim.test_lamb import network, train


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_timm(momentum):
    net = network()
    other = copy.deepcopy(net)
    layers = [parameter for parameter in other.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in other.parameters() if parameter.ndim == 1]
    settings = {"lr": 0.7, "momentum": momentum, "trust_coeff": 0.02}
    theirs = Lars([{"params": layers, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.0}], **settings)
    ours = LARS(net.parameters(), lr=0.7, momentum=momentum, weight_decay=0.01, trust_coefficient=0.02)
    for one, two in zip(train(net, ours), train(other, theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_equals_timm_on_all_parameters():
    net = network()
    other = copy.deepcopy(net)
    theirs = Lars(other.parameters(), lr=0.7, momentum=0.9, trust_coeff=0.02, always_adapt=True)
    ours = LARS(net.parameters(), lr=0.7, weight_decay=0.0, trust_coefficient=0.02, exclude_1d=False)
    for one, two in zip(train(net, ours), train(other, theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_biases_take_the_steps_of_sgd_and_gradients_are_left_as_they_are():
    net = nn.Linear(3, 2)
    other = copy.deepcopy(net)
    for each in (net, other):
        each.weight.grad, each.bias.grad = torch.ones(2, 3), torch.tensor([1.0, -2.0])
    ours = LARS(net.parameters(), lr=0.1, weight_decay=0.5)
    theirs = torch.optim.SGD([other.bias], lr=0.1, momentum=0.9)
    for _ in range(3):
        ours.step()
        theirs.step()
    torch.testing.assert_close(net.bias, other.bias)
    assert torch.equal(net.weight.grad, torch.ones(2, 3))
    assert torch.equal(net.bias.grad, torch.tensor([1.0, -2.0]))


def test_first_step_is_a_share_of_the_norm_of_the_weights():
    weight = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    weight.grad = 1e4 * torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    LARS([weight], lr=2.0, weight_decay=0.0, trust_coefficient=0.01, eps=0.0).step()
    assert (weight - before).norm().item() == pytest.approx(0.02 * before.norm().item(), rel=1e-5)


def test_zero_weights_take_the_plain_step():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.1).step()
    torch.testing.assert_close(weight.data, torch.full((2, 2), -0.1))


def test_state_goes_on_after_loading():
    net = network()
    first = LARS(net.parameters(), lr=0.5)
    train(net, first, steps=2)
    other = copy.deepcopy(net)
    second = LARS(other.parameters(), lr=0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for one, two in zip(train(net, first, steps=2), train(other, second, steps=2), strict=True):
        assert torch.equal(one, two)


def test_sparse_gradient_is_refused():
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="LARS needs dense gradients"):
        LARS([table.weight], lr=0.1).step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "`lr`"),
        ({"lr": 0.1, "momentum": 1.0}, "`momentum`"),
        ({"lr": 0.1, "weight_decay": -1.0}, "`weight_decay`"),
        ({"lr": 0.1, "trust_coefficient": float("inf")}, "`trust_coefficient`"),
        ({"lr": 0.1, "eps": -1.0}, "`eps`"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        LARS([nn.Parameter(torch.ones(1))], **arguments)
