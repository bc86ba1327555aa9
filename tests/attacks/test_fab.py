"""FAB: smallest perturbations of a linear model, verdicts beside torchattacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_trust.attacks import FAB, APGDTargeted
from lightning_trust.functional.adversarial import norm_of
from tests.attacks.networks import check_attack, draws, images, right, small

EPS = {"linf": 0.03, "l2": 0.25, "l1": 1.5}
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("targets", [None, 3])
def test_invariants(norm, targets):
    check_attack(FAB(2 * EPS[norm], norm, steps=8, n_target_classes=targets))
    check_attack(FAB(None, norm, steps=8, restarts=2, n_target_classes=targets))


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("targets", [None, 3])
def test_smallest_perturbation_of_a_linear_model(norm, targets):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double().eval()
    # in the middle of the box, where it does not clip
    x = 0.5 + 0.01 * torch.randn(20, 1, 8, 8, dtype=torch.float64)
    y = net(x).argmax(dim=1)
    found = FAB(None, norm, steps=20, n_target_classes=targets)(net, x, y, draws=draws(20))
    outputs, weight = net(x).detach(), net[1].weight.detach()
    gaps = outputs.gather(1, y[:, None]) - outputs
    slopes = norm_of((weight[None] - weight[y][:, None]).flatten(0, 1), DUAL[norm]).view(20, 4)
    least = (gaps / slopes.clamp_min(1e-9)).scatter(1, y[:, None], torch.inf).amin(dim=1)
    lengths = norm_of(found - x, norm)
    assert not right(net, found, y).any()
    assert (lengths >= least - 1e-9).all()
    # the overshoot of 5 % is drawn back by steps of a tenth
    assert (lengths <= 1.06 * least).all()


@pytest.mark.parametrize("norm", EPS)
def test_only_points_in_the_ball_count(norm):
    net = small()
    x, y = images(80, net, wrong=5)
    found = FAB(EPS[norm], norm, steps=30, n_target_classes=5)(net, x, y, draws=draws(80))
    moved = (found != x).flatten(1).any(dim=1)
    assert (norm_of(found - x, norm) <= EPS[norm]).all()
    assert not right(net, found, y)[moved].any()
    assert torch.equal(found[:5], x[:5])
    assert 0 < moved.sum() < 75
    # as many as an attack that fills the ball
    filled = APGDTargeted(EPS[norm], norm, 5, steps=30)(net, x, y, draws=draws(80))
    assert abs(int(right(net, found, y).sum()) - int(right(net, filled, y).sum())) <= 2


# torchattacks stops with an UnboundLocalError in l1
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_robust_accuracy_of_torchattacks(norm):
    torchattacks = pytest.importorskip("torchattacks")
    net = small()
    x, y = images(200, net)
    found = FAB(EPS[norm], norm, steps=30)(net, x, y, draws=draws(200))
    name = {"linf": "Linf", "l2": "L2"}[norm]
    theirs = torchattacks.FAB(net, norm=name, eps=EPS[norm], steps=30, n_classes=6)(x, y)
    # theirs returns what lies outside of the ball as well
    held = right(net, theirs, y) | (norm_of(theirs - x, norm) > EPS[norm])
    assert abs(int(right(net, found, y).sum()) - int(held.sum())) <= 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FAB(alpha_max=0.0), r"`alpha_max` to be in \(0, 1\]"),
        (lambda: FAB(beta=1.5), r"`beta` to be in \(0, 1\], but got 1.5"),
        (lambda: FAB(eta=0.9), "`eta` to be at least 1, but got 0.9"),
        (lambda: FAB(n_target_classes=0), "`n_target_classes` to be at least 1"),
        (lambda: FAB(restarts=0), "`restarts` to be at least 1"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()
