"""ZO-signSGD and NES: budget, counted queries, progress."""

from __future__ import annotations

import pytest
import torch

from lightning_trust.attacks import NES, ZOSignAttack
from lightning_trust.functional.adversarial import norm_of
from tests.attacks.networks import Counting, check_attack, draws, images, right, small


@pytest.mark.parametrize("kind", [ZOSignAttack, NES])
def test_invariants(kind):
    for norm, eps in (("linf", 0.05), ("l2", 0.4), ("l1", 3.0)):
        check_attack(kind(eps, norm, steps=5, lr=0.01, q=4), atol=1e-5)


@pytest.mark.parametrize("kind", [ZOSignAttack, NES])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_breaks_samples_in_the_ball_with_scores_alone(kind, loss):
    net = Counting(small())
    x, y = images(30, net.net, wrong=3)
    attack = kind(0.08, steps=60, lr=0.005, q=20, loss=loss)
    found = attack(net, x, y, draws=draws(30))
    assert (norm_of(found - x, "linf") <= 0.08 + 1e-6).all()
    assert right(net.net, found, y).sum() < 15
    assert attack.queries.sum() == net.rows
    assert (attack.queries[:3] == 1).all()
    # the clean input, and q points and a look a step
    assert ((attack.queries - 1) % 21 == 0).all()
    assert attack.queries.max() <= 1 + 60 * 21


def test_a_step_of_nes_moves_the_root_mean_square_of_an_entry():
    net = small()
    x, y = images(10, net)
    x = 0.3 + 0.4 * x
    y = net(x).argmax(dim=1)
    found = NES(0.5, steps=1, lr=0.003)(net, x, y, draws=draws(10))
    torch.testing.assert_close(norm_of(found - x, "l2") / 8.0, torch.full((10,), 0.003), rtol=1e-4, atol=0.0)


def test_targeted():
    net = small()
    x, y = images(20, net)
    goal = (y + 1) % 6
    found = ZOSignAttack(0.3, steps=100, lr=0.01, q=20, targeted=True)(net, x, y, target=goal, draws=draws(20))
    assert (net(found).argmax(dim=1) == goal).float().mean() > 0.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ZOSignAttack(lr=0.0), "`lr` to be positive, but got 0.0"),
        (lambda: ZOSignAttack(mu=0.0), "`mu` to be positive, but got 0.0"),
        (lambda: ZOSignAttack(q=0), "`q` to be at least 1, but got 0"),
        (lambda: ZOSignAttack(steps=0), "`steps` to be at least 1"),
        (lambda: NES(q=5), "`q` to be even for NES.*but got 5"),
        (lambda: NES(loss="kl"), "`loss` to be 'ce', 'dlr' or 'margin', but got 'kl'"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_works_on_rows_of_features():
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 3)
    x = torch.rand(5, 6)
    found = ZOSignAttack(0.1, steps=3, lr=0.02)(net, x, net(x).argmax(dim=1))
    assert found.shape == x.shape
