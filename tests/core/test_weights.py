"""Weights that are swapped by copy, and tensors that take the place of parameters."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from lightning_trust.core.weights import substituted, swapped


def network() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", [substituted, lambda net, values: swapped(dict(net.named_parameters()), values)])
def test_a_tied_weight_is_another_one_inside(change, fails):
    net, x = network(), torch.randn(4, 3)
    before, parameters = net(x), dict(net.named_parameters())
    other = torch.randn(3, 3)
    expected = (x @ other.T + net[0].bias).tanh() @ other.T + net[2].bias
    with suppress(ZeroDivisionError), change(net, {"0.weight": other}):
        torch.testing.assert_close(net(x), expected)
        if fails:
            raise ZeroDivisionError
    assert torch.equal(net(x), before)
    assert all(value is parameters[name] for name, value in net.named_parameters())


def test_many_weights_at_once():
    net, x = network(), torch.randn(4, 3)
    many = torch.randn(5, 3, 3)

    def output(weight):
        with substituted(net, {"0.weight": weight}):
            return net(x)

    found = torch.func.vmap(output)(many)
    for weight, each in zip(many, found, strict=True):
        torch.testing.assert_close(output(weight), each)
