"""WorstOf: what each attack finds alone, by its loss; one attack is itself; bad input."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from lightning_trust.attacks import MSD, PGD, FastFGSM, WorstOf
from lightning_trust.core.space import InputSpace
from lightning_trust.nn import SmallCNN


def problem():
    torch.manual_seed(0)
    net = SmallCNN(widths=(4, 8)).eval()
    return net, torch.rand(12, 1, 8, 8), torch.arange(12) % 10


def balls():
    # none of them is the worst for every sample
    return [
        PGD(eps=0.03, steps=4, random_start=False),
        PGD(eps=0.17, steps=4, norm="l2", random_start=False),
        PGD(eps=1.1, steps=4, norm="l1", l1_step="apgd", random_start=False),
    ]


def test_each_sample_gets_the_largest_loss():
    net, x, y = problem()
    alone = [attack(net, x, y) for attack in balls()]
    losses = torch.stack([F.cross_entropy(net(found), y, reduction="none") for found in alone]).detach()
    which = losses.argmax(dim=0)
    assert len(which.unique()) > 1
    found = WorstOf(balls())(net, x, y)
    assert torch.equal(found, torch.stack([alone[place][row] for row, place in enumerate(which.tolist())]))


def test_one_attack_is_itself():
    net, x, y = problem()
    torch.manual_seed(3)
    alone = PGD(eps=0.1, steps=2)(net, x, y)
    torch.manual_seed(3)
    assert torch.equal(WorstOf([PGD(eps=0.1, steps=2)])(net, x, y), alone)


def test_parts_and_zero_radius():
    net, x, y = problem()
    torch.testing.assert_close(WorstOf(balls(), batch_size=5)(net, x, y), WorstOf(balls())(net, x, y))
    assert torch.equal(WorstOf([PGD(eps=0.0)])(net, x, y), x)


def test_network_is_left_as_it_was():
    net, x, y = problem()
    net.train()
    before = copy.deepcopy(net.state_dict())
    WorstOf([PGD(eps=0.1, steps=2, batch_norm="batch"), MSD(steps=2, batch_norm="batch")])(net, x, y)
    assert net.training
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value), name


def test_bad_input():
    for attacks, words in (
        ([], "at least one attack, but got none"),
        ([PGD(targeted=True)], "targeted=False, but got a PGD with targeted=True"),
        ([FastFGSM(), PGD(batch_size=3)], "batch_size=None, but got a PGD with batch_size=3"),
        ([PGD(space=InputSpace())], "space=None, but got a PGD"),
        ([PGD(), PGD(batch_norm="batch")], r"same `batch_norm`, but got \['batch', 'eval'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            WorstOf(attacks)
    net, x, y = problem()
    with pytest.raises(ValueError, match="eps"):
        WorstOf([PGD(eps=0.1), PGD(eps=8.0)])(net, x, y)
