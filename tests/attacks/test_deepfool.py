"""DeepFool: one step on a linear model, and stops where it has won."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_trust.attacks import DeepFool
from lightning_trust.functional.adversarial import norm_of
from tests.attacks.networks import check_attack, images, right, small


def test_invariants():
    check_attack(DeepFool(steps=6))


def test_length_on_a_linear_model_is_the_gap_over_the_norm_of_the_weight():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double().eval()
    x = 0.5 + 0.01 * torch.randn(10, 1, 8, 8, dtype=torch.float64)
    y = net(x).argmax(dim=1)
    outputs, weight = net(x).detach(), net[1].weight.detach()
    gaps = outputs.gather(1, y[:, None]) - outputs
    distances = gaps / (weight[None] - weight[y][:, None]).norm(dim=2).clamp_min(1e-9)
    least = distances.scatter(1, y[:, None], torch.inf).amin(dim=1)
    found = DeepFool(overshoot=0.02)(net, x, y)
    torch.testing.assert_close(norm_of(found - x, "l2"), 1.02 * least)
    assert not right(net, found, y).any()


def test_stops_where_it_has_won_and_returns_the_last_point_where_it_has_not():
    net = small()
    x, y = images(40, net, wrong=3)
    sizes = []

    class Seen(nn.Module):
        def forward(self, z):
            sizes.append(len(z))
            return net(z)

    found = DeepFool()(Seen(), x, y)
    assert not right(net, found, y).any()
    assert torch.equal(found[:3], x[:3])
    assert sizes[:2] == [40, 37]
    assert sizes == sorted(sizes, reverse=True)
    one = DeepFool(steps=1, overshoot=0.0)(net, x, y)
    assert (one != x).flatten(1).any(dim=1)[3:].all()


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="`steps` to be at least 1, but got 0"):
        DeepFool(steps=0)
    with pytest.raises(ValueError, match=r"`overshoot` to be at least 0, but got -0.1"):
        DeepFool(overshoot=-0.1)
