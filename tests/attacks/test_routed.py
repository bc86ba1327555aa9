"""RoutedPGD: decisions that other attacks leave alone, the step by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trust.attacks import PGD, RoutedPGD
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.nn import SmallCNN, convert_to_moe
from lightning_trust.nn.adversarial.moe import MoEConv2d, MoENetwork, RoutingContext


class Brightness(nn.Module):
    """Scores: which of two experts an image gets is a matter of its mean."""

    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([10.0 * (0.5 - mean), 10.0 * (mean - 0.5)], dim=1)


@pytest.fixture
def opinionated():
    """Two experts, each of which says its own class whatever it sees."""
    context = RoutingContext()
    layer = MoEConv2d(1, 2, 1, num_experts=2, context=context)
    with torch.no_grad():
        layer.weight.zero_()
        # expert 0 says class 0, expert 1 class 1
        layer.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(layer.bias.shape))
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MoENetwork(network, Brightness(), 2, context, "mask").eval()


def test_decision_that_pgd_leaves_alone_is_moved(opinionated):
    x = torch.full((2, 1, 4, 4), 0.47)
    y = torch.zeros(2, dtype=torch.int64)
    assert opinionated(x).argmax(dim=1).tolist() == [0, 0]
    plain = PGD(eps=0.1, steps=5, random_start=False)(opinionated, x, y)
    assert opinionated(plain).argmax(dim=1).tolist() == [0, 0]
    moved = RoutedPGD(eps=0.1, steps=5, random_start=False)(opinionated, x, y)
    assert opinionated(moved).argmax(dim=1).tolist() == [1, 1]
    torch.testing.assert_close(moved, torch.full_like(x, 0.57))
    # a radius that does not reach the border
    near = RoutedPGD(eps=0.02, steps=5, random_start=False)(opinionated, x, y)
    assert opinionated(near).argmax(dim=1).tolist() == [0, 0]


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_first_step_by_hand(weight):
    torch.manual_seed(0)
    moe = convert_to_moe(SmallCNN(1, 4, widths=(4, 8)), ratio=0.5).double()
    x, y = torch.rand(6, 1, 8, 8).double(), torch.arange(6) % 4
    moe.train()
    found = RoutedPGD(eps=0.1, step_size=0.03, steps=1, random_start=False, router_weight=weight)(moe, x, y)
    assert moe.training
    assert all(parameter.grad is None for parameter in moe.parameters())
    moe.eval()
    place = x.float().double().requires_grad_()
    logits, scores = moe.forward_with_scores(place)
    loss = F.cross_entropy(logits, y, reduction="sum") + weight * F.cross_entropy(
        scores, scores.argmax(dim=1), reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, place)
    expected = (x + 0.03 * gradient.sign()).clamp(0.0, 1.0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_same_samples_in_parts_and_in_norms():
    torch.manual_seed(0)
    moe = convert_to_moe(SmallCNN(1, 4, widths=(4, 8)), ratio=0.5)
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5) % 4
    for norm, eps in (("linf", 0.1), ("l2", 0.5), ("l1", 2.0)):
        attack = RoutedPGD(eps=eps, norm=norm, steps=3, random_start=False)
        parts, whole = (
            each(moe, x, y, draws=SampleDraws(torch.arange(5), 3)) for each in (attack.replaced(batch_size=2), attack)
        )
        torch.testing.assert_close(parts, whole)
        assert attack.replaced(eps=0.0)(moe, x, y).equal(x)


def test_bad_input(opinionated):
    with pytest.raises(ValueError, match=r"`router_weight` to be positive, but got 0\.0"):
        RoutedPGD(router_weight=0.0)
    with pytest.raises(ValueError, match="moves the decision of a MoENetwork, but got a SmallCNN"):
        RoutedPGD()(SmallCNN(), torch.rand(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="RoutedPGD to hold classes in"):
        RoutedPGD()(opinionated, torch.rand(2, 1, 4, 4), torch.tensor([0, 5]))
