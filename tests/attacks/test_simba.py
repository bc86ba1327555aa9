"""SimBA: orthonormal steps without replacement, falling probability, counted queries."""

from __future__ import annotations

import pytest
import torch

from lightning_trust.attacks import SimBA
from lightning_trust.functional.adversarial import norm_of
from tests.attacks.networks import Counting, check_attack, draws, images, right, small


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_invariants(basis):
    check_attack(SimBA(step=0.1, max_queries=60, basis=basis))


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_probability_falls_and_queries_are_counted(basis):
    net = Counting(small().double())
    x, y = images(30, net.net, wrong=3)
    last = None
    for count in (1, 5, 20, 80):
        net.rows = 0
        attack = SimBA(step=0.15, max_queries=count, basis=basis)
        found = attack(net, x, y, draws=draws(30))
        assert attack.queries.sum() == net.rows
        assert (attack.queries <= count).all()
        assert (attack.queries[:3] == 1).all()
        probability = net.net(found).softmax(dim=1).gather(1, y[:, None]).squeeze(1)
        # what is broken is kept whatever its probability
        probability = probability.masked_fill(~right(net.net, found, y), 0.0)
        assert last is None or (probability <= last).all()
        last = probability
    assert right(net.net, found, y).sum() < 20


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_length_is_the_step_times_the_root_of_the_kept_steps(basis):
    # far from the faces of the box, and nothing is ever broken
    x = torch.full((4, 1, 6, 6), 0.5, dtype=torch.float64)
    slope = torch.randn(36, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net = lambda z: torch.stack([z.flatten(1) @ slope, 0 * z.flatten(1) @ slope - 1e3], dim=1)  # noqa: E731
    found = SimBA(step=0.01, max_queries=10000, basis=basis)(net, x, torch.zeros(4, dtype=torch.long))
    # on a linear model one of the two signs always lowers the logit: every direction is kept
    torch.testing.assert_close(norm_of(found - x, "l2"), torch.full((4,), 0.06, dtype=torch.float64))
    if basis == "pixel":
        torch.testing.assert_close(found[0].flatten() - 0.5, -0.01 * slope.sign())


def test_low_frequencies_only():
    x = torch.full((3, 2, 8, 8), 0.5, dtype=torch.float64)
    slope = torch.randn(128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net = lambda z: torch.stack([z.flatten(1) @ slope, 0 * z.flatten(1) @ slope - 1e3], dim=1)  # noqa: E731
    attack = SimBA(step=0.01, basis="dct", frequency_share=0.25)
    found = attack(net, x, torch.zeros(3, dtype=torch.long))
    # two channels of two by two waves
    torch.testing.assert_close(norm_of(found - x, "l2"), torch.full((3,), 0.01 * 8**0.5, dtype=torch.float64))
    assert (attack.queries <= 1 + 2 * 8).all()


def test_targeted():
    net = small()
    x, y = images(20, net)
    goal = (y + 1) % 6
    found = SimBA(step=0.3, targeted=True)(net, x, y, target=goal, draws=draws(20))
    assert (net(found).argmax(dim=1) == goal).float().mean() > 0.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SimBA(step=0.0), "`step` to be positive, but got 0.0"),
        (lambda: SimBA(max_queries=0), "`max_queries` to be at least 1"),
        (lambda: SimBA(basis="haar"), "`basis` to be 'pixel' or 'dct', but got 'haar'"),
        (lambda: SimBA(frequency_share=0.0), r"`frequency_share` to be in \(0, 1\]"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_waves_need_images():
    net = torch.nn.Linear(4, 3)
    x = torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"images of shape \(N, C, H, W\) for SimBA\(basis='dct'\)"):
        SimBA(basis="dct")(net, x, net(x).argmax(dim=1))
