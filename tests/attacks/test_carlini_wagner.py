"""C&W-l2: a linear model's margin, the search for the weight, foolbox beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_trust.attacks import CWL2, PGD
from lightning_trust.functional.adversarial import margin, norm_of
from tests.attacks.networks import check_attack, draws, images, right, small


def test_invariants():
    check_attack(CWL2(c=50.0, steps=10, lr=0.05))
    check_attack(CWL2(c=1.0, steps=6, lr=0.05, binary_search_steps=3))


def test_smallest_perturbation_of_a_linear_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double().eval()
    x = 0.5 + 0.01 * torch.randn(10, 1, 8, 8, dtype=torch.float64)
    y = net(x).argmax(dim=1)
    least = margin(net(x), y).detach() / (net[1].weight[0] - net[1].weight[1]).norm().item()
    found = CWL2(c=1e-2, steps=150, lr=0.01, binary_search_steps=7)(net, x, y)
    lengths = norm_of(found - x, "l2")
    assert not right(net, found, y).any()
    assert (lengths >= least).all()
    assert (lengths <= 1.05 * least).all()


def test_wanted_margin_is_reached():
    net = small()
    x, y = images(20, net)
    found = CWL2(c=10.0, kappa=0.3, steps=100, lr=0.02)(net, x, y)
    moved = (found != x).flatten(1).any(dim=1)
    assert moved.sum() > 15
    assert (margin(net(found), y)[moved] <= -0.3 + 1e-4).all()


def test_search_for_the_weight_goes_up_until_it_wins_and_then_shortens():
    net = small()
    x, y = images(60, net)
    # whatever the weight, the first step of Adam has the length of the learning rate: who is as near as that is won
    near = ~right(net, PGD(0.03, steps=20, random_start=False)(net, x, y), y)
    x, y = x[~near][:20], y[~near][:20]
    assert len(x) == 20
    light = CWL2(c=1e-4, steps=40)
    assert torch.equal(light(net, x, y), x)
    few, many = (light.replaced(lr=0.02, binary_search_steps=count)(net, x, y) for count in (5, 9))
    assert not right(net, few, y).any()
    shorter = norm_of(few - x, "l2") - norm_of(many - x, "l2")
    assert (shorter >= -1e-6).all()
    assert shorter.max() > 0.01


def test_targeted():
    net = small()
    x, y = images(30, net)
    goal = (y + 2) % 6
    found = CWL2(c=10.0, steps=150, lr=0.03, targeted=True)(net, x, y, target=goal, draws=draws(30))
    assert (net(found).argmax(dim=1) == goal).float().mean() > 0.9


def test_abort_early_saves_steps():
    net = small()
    x, y = images(10, net)
    calls = [0, 0]

    def counted(place):
        def model(z):
            calls[place] += 1
            return net(z)

        return model

    CWL2(c=1e-3, steps=100, lr=0.5)(counted(0), x, y)
    CWL2(c=1e-3, steps=100, lr=0.5, abort_early=True)(counted(1), x, y)
    assert calls[1] < calls[0]


def test_norms_of_foolbox():
    foolbox = pytest.importorskip("foolbox")
    net = small()
    x, y = images(30, net)
    found = CWL2(c=1e-3, steps=100, lr=0.01, binary_search_steps=8)(net, x, y)
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=9, steps=100, stepsize=0.01, initial_const=1e-3, abort_early=False
    )
    _, theirs, _ = attack(foolbox.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=None)
    ours, other = norm_of(found - x, "l2"), norm_of(theirs - x, "l2")
    assert not right(net, found, y).any()
    torch.testing.assert_close(ours.median(), other.median(), rtol=0.02, atol=0.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CWL2(c=0.0), "`c` to be positive, but got 0.0"),
        (lambda: CWL2(lr=-1.0), "`lr` to be positive"),
        (lambda: CWL2(kappa=-1.0), "`kappa` to be at least 0"),
        (lambda: CWL2(binary_search_steps=-1), "`binary_search_steps` to be at least 0"),
        (lambda: CWL2(steps=0), "`steps` to be at least 1"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()
