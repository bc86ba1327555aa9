"""Square: budget, monotone progress, schedule, counted queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_trust.attacks import PGD, Square
from lightning_trust.functional.adversarial import margin, norm_of
from tests.attacks.networks import Counting, check_attack, draws, images, right, small

EPS = {"linf": 0.04, "l2": 0.4, "l1": 3.0}


@pytest.mark.parametrize("norm", EPS)
def test_invariants(norm):
    check_attack(Square(EPS[norm], norm, n_queries=70))


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_more_queries_never_raise_the_margin(norm, loss):
    net = small()
    x, y = images(40, net)
    last = None
    for count in (1, 10, 70, 200):
        attack = Square(EPS[norm], norm, n_queries=count, loss=loss, resc_schedule=False)
        found = attack(net, x, y, draws=draws(40))
        assert (norm_of(found - x, norm) <= EPS[norm] * (1 + 1e-6) + 1e-6).all()
        outputs = net(found)
        value = margin(outputs, y) if loss == "margin" else -F.cross_entropy(outputs, y, reduction="none")
        # what is broken is kept whatever its loss
        value = value.masked_fill(outputs.argmax(dim=1) != y, -torch.inf)
        assert last is None or (value <= last + 1e-5).all()
        last = value
    assert not right(net, found, y).all()


@pytest.mark.parametrize("norm", EPS)
def test_queries_are_those_that_the_network_saw(norm):
    # in double precision, because the parts of a batch are rounded in another way than the whole
    net = Counting(small().double())
    x, y = images(30, net.net, wrong=3)
    attack = Square(EPS[norm], norm, n_queries=60, restarts=2)
    attack(net, x, y, draws=draws(30))
    assert attack.queries.sum() == net.rows
    assert attack.queries.dtype == torch.int64
    assert (attack.queries[:3] == 1).all()
    assert (attack.queries <= 1 + 2 * 61).all()
    whole = attack.queries
    parts = attack.replaced(batch_size=7)
    parts(net, x, y, draws=draws(30))
    assert torch.equal(parts.queries, whole)


def test_a_window_that_changes_nothing_is_not_asked_for():
    net = small()
    x, y = images(30, net)
    attack = Square(1e-3, n_queries=400)
    attack(net, x, y, draws=draws(30))
    held = attack.queries[right(net, attack(net, x, y, draws=draws(30)), y)]
    assert (held < 390).all()
    assert (held > 150).all()


def test_windows_shrink_on_schedule():
    plain, scaled = Square(0.1, resc_schedule=False), Square(0.1, n_queries=1000)
    shares = [plain.share(query) for query in (0, 10, 11, 50, 51, 200, 201, 500, 501, 2000, 2001, 8000, 8001)]
    assert shares == [0.8 / 2**k for k in (0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 9)]
    assert scaled.share(0) == 0.8
    assert scaled.share(6) == 0.8 / 4
    assert scaled.share(801) == 0.8 / 512


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 3, 4, 9), (2, 1, 1, 1)])
@pytest.mark.parametrize("norm", EPS)
def test_images_of_any_size(shape, norm):
    x = torch.rand(*shape)
    net = lambda z: torch.stack([z.sum(dim=(1, 2, 3)), z.sum(dim=(1, 2, 3)) * 0.0 - 100.0], dim=1)  # noqa: E731
    found = Square(0.1, norm, n_queries=40)(net, x, torch.zeros(2, dtype=torch.long))
    assert (norm_of(found - x, norm) <= 0.1 + 1e-6).all()
    assert (found != x).flatten(1).any(dim=1).all()
    if norm == "linf":  # bumps have two halves of opposite sign
        assert (found.sum(dim=(1, 2, 3)) < x.sum(dim=(1, 2, 3))).all()


def test_not_worse_than_torchattacks():
    torchattacks = pytest.importorskip("torchattacks")
    net = small()
    x, y = images(200, net)
    for norm, name in (("linf", "Linf"), ("l2", "L2")):
        found = Square(EPS[norm], norm, n_queries=500)(net, x, y, draws=draws(200))
        theirs = torchattacks.Square(net, norm=name, eps=EPS[norm], n_queries=500)(x, y)
        assert right(net, found, y).sum() <= right(net, theirs, y).sum() + 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Square(n_queries=0), "`n_queries` to be at least 1"),
        (lambda: Square(p_init=0.0), r"`p_init` to be in \(0, 1\]"),
        (lambda: Square(loss="dlr"), "`loss` to be 'margin' or 'ce', but got 'dlr'"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_rows_are_no_images():
    net = torch.nn.Linear(4, 3)
    x = torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"images of shape \(N, C, H, W\) for Square, but got shape \(2, 4\)"):
        Square(0.1)(net, x, net(x).argmax(dim=1))


def test_attacks_that_use_gradients_count_nothing():
    with pytest.raises(AttributeError, match="PGD has counted no queries"):
        _ = PGD().queries


def test_every_restart_draws_anew():
    net = small()
    x, y = images(60, net)
    one, three = (Square(0.035, n_queries=20, restarts=count) for count in (1, 3))
    broken = [~right(net, attack(net, x, y, draws=draws(60)), y) for attack in (one, three)]
    assert (broken[0] <= broken[1]).all()
    assert broken[1].sum() > broken[0].sum()
