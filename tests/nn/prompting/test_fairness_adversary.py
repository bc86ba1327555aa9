"""The adversary's strength against entropies, what it sees against the formula, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_trust.nn import FairnessAdversary


def trained(adversary, logits, targets, groups, steps=150, lr=0.01):
    optimizer = torch.optim.Adam(adversary.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = adversary.loss(logits, targets, groups)
        loss.backward()
        optimizer.step()
    return adversary.loss(logits, targets, groups).item()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("criterion", ["dp", "eo"])
def test_strength_is_the_entropy_where_there_is_nothing_to_read(criterion):
    groups, targets = torch.arange(4000) % 2, torch.randint(2, (4000,))
    logits = torch.randn(4000, 2)
    found = trained(FairnessAdversary(criterion=criterion, hidden=(16,)), logits, targets, groups)
    assert found == pytest.approx(math.log(2), abs=0.01)


@pytest.mark.parametrize("criterion", ["dp", "eo"])
def test_strength_is_nothing_where_the_output_is_the_group(criterion):
    groups, targets = torch.randint(2, (500,)), torch.randint(2, (500,))
    logits = 2.0 * F.one_hot(groups, 2).float()
    assert trained(FairnessAdversary(criterion=criterion, hidden=(16,)), logits, targets, groups) < 0.01


def test_equalised_odds_finds_what_the_class_does_not_explain():
    """Output is the class, the class tells the group: parity is violated, odds are not."""
    targets = torch.arange(2000) % 2
    groups = torch.where(torch.rand(2000) < 0.9, targets, 1 - targets)
    logits = 2.0 * F.one_hot(targets, 2).float()
    rates = [groups[targets == y].float().mean().item() for y in range(2)]
    conditional = -sum(rate * math.log(rate) + (1 - rate) * math.log(1 - rate) for rate in rates) / 2
    for criterion in ("dp", "eo"):
        found = trained(FairnessAdversary(criterion=criterion, hidden=(16,)), logits, targets, groups)
        assert found == pytest.approx(conditional, abs=0.01)
    # the output is the group given the class, and independent of it without
    independent = torch.randint(2, (2000,))
    hidden = 2.0 * F.one_hot(groups ^ independent, 2).float()
    assert trained(FairnessAdversary(criterion="eo", hidden=(32,)), hidden, independent, groups) < 0.05
    assert trained(FairnessAdversary(criterion="dp", hidden=(32,)), hidden, independent, groups) > 0.6


def test_what_it_sees():
    logits, targets = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    seen = {}
    for criterion in ("dp", "eo"):
        for use_logits in (True, False):
            adversary = FairnessAdversary(3, 2, criterion, (4,), use_logits)
            adversary.sharpness.data.fill_(-0.5)
            adversary.layers.register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0]))
            adversary(logits, targets)
            scores = (1.5 * logits).softmax(dim=1)
            parts = [scores, *([scores * F.one_hot(targets, 3)] if criterion == "eo" else [])]
            torch.testing.assert_close(seen["inputs"], torch.cat([*parts, *([logits] if use_logits else [])], dim=1))


def test_one_logit():
    logits, targets = torch.randn(4, 1), torch.tensor([0, 1, 1, 0])
    seen = {}
    adversary = FairnessAdversary(1, 2, "eo", (128, 128), use_logits=False)
    adversary.layers.register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0]))
    adversary(logits, targets)
    scores = torch.sigmoid(2.0 * logits[:, 0])
    expected = torch.stack([scores, scores * targets, scores * (1 - targets)], dim=1)
    torch.testing.assert_close(seen["inputs"], expected)


def test_loss_of_groups():
    logits, targets = torch.randn(6, 2), torch.randint(2, (6,))
    groups = torch.tensor([0, 2, 1, 1, 0, 2])
    adversary = FairnessAdversary(2, 3)
    expected = -adversary(logits).log_softmax(dim=1)[torch.arange(6), groups].mean()
    torch.testing.assert_close(adversary.loss(logits, None, groups), expected)
    overlapping = FairnessAdversary(2, 3, overlapping=True)
    members = torch.randint(2, (6, 3))
    chances = torch.sigmoid(overlapping(logits))
    expected = -torch.where(members == 1, chances.log(), (1 - chances).log()).mean()
    torch.testing.assert_close(overlapping.loss(logits, targets, members), expected)


def test_bad_input():
    for arguments, message in (
        ({"num_classes": 0}, "`num_classes` to be at least 1, but got 0"),
        ({"num_groups": 1}, "`num_groups` to be at least 2, but got 1"),
        ({"num_groups": 0, "overlapping": True}, "`num_groups` to be at least 1, but got 0"),
        ({"criterion": "cf"}, "`criterion` to be 'dp' or 'eo', but got 'cf'"),
        ({"hidden": (0,)}, "`hidden` to be positive integers"),
    ):
        with pytest.raises(ValueError, match=message):
            FairnessAdversary(**arguments)
    adversary = FairnessAdversary(2, 2, "eo")
    with pytest.raises(ValueError, match=r"logits of shape \(N, 2\), one a class, but got \(4, 3\)"):
        adversary(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"logits of shape \(N, 2\), one a class, but got \(4, 2, 2\)"):
        adversary(torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match=r"targets of shape \(4,\) for criterion='eo', but got none"):
        adversary(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"groups as integers of shape \(4,\), but got torch.float32"):
        adversary.loss(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"zeros and ones of shape \(4, 2\), but got \(4,\)"):
        FairnessAdversary(overlapping=True).loss(torch.zeros(4, 2), None, torch.zeros(4))
