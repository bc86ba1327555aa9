"""The benchmark of the attacks, at a size that takes no time: its rows, and what it says where a peer is missing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attacks as benchmark
from lightning_trust.attacks import FGSM, Square
from tests.attacks.networks import images, small


@pytest.fixture
def made():
    net = small()
    x, y = images(8, net, wrong=1)
    return {"plain": net, "adversarial": net}, (x, y)


def check(row):
    assert row.keys() == {"what", "value", "bar", "reached", "medians"}
    if row["value"] == "not measured":
        assert row["reached"] is None
    else:
        assert row["reached"] is (row["value"] <= row["bar"])


def test_pgd_beside_a_loop():
    linear = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))  # noqa: E731
    rows = benchmark.pgd(1, rows=2, steps=2, made={"linear": linear})
    assert [row["what"] for row in rows] == [
        "PGD-2 in training over a bare loop, linear, batch 2",
        "PGD-2 in training over torchattacks, linear, batch 2",
    ]
    for row in rows:
        check(row)
    assert rows[0]["value"] == round(rows[0]["medians"]["ours"] / rows[0]["medians"]["bare"], 4)


def test_loop_by_hand_is_pgd():
    net = small().double()
    x, y = images(8, net)
    torch.manual_seed(1)
    found = benchmark.bare_pgd(net, x, y, 5)
    torch.manual_seed(1)
    start = (x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0.0, 1.0)
    for _ in range(5):
        place = start.clone().requires_grad_()
        torch.nn.functional.cross_entropy(net(place), y, reduction="sum").backward()
        start = (x + (start + 0.02 * place.grad.sign() - x).clamp(-0.1, 0.1)).clamp(0.0, 1.0)
    torch.testing.assert_close(found, start)


def test_auto_attack_beside_peers(made):
    networks, samples = made
    rows = benchmark.auto_attack(networks, samples, steps=3, n_queries=5)
    assert [row["bar"] for row in rows] == [1.0, 0.3, 1.0, 0.3, 1.0, 0.9, 1.0, 0.9]
    for row in rows:
        check(row)
    assert all(0.0 <= row["medians"]["robust/ours"] < 1.0 for row in rows[::2])


def test_a_peer_that_is_missing_is_named(made, monkeypatch):
    monkeypatch.setattr(benchmark, "peer", lambda name: None)
    rows = benchmark.auto_attack(*made, steps=2, n_queries=3)
    assert len(rows) == 8
    assert all((row["value"], row["reached"]) == ("not measured", None) for row in rows)
    assert "torchattacks" in rows[0]["what"]
    assert "pyautoattack" in rows[2]["what"]


def test_small_experiment(made):
    networks, samples = made
    attacks = {"FGSM": FGSM(0.02), "corners": benchmark.RandomCorners(0.02, 3), "Square": Square(0.02, n_queries=4)}
    rows = benchmark.small_experiment(networks, samples, attacks)
    assert [(row["network"], row["attack"]) for row in rows[:4]] == [
        ("plain", "none"),
        ("plain", "FGSM"),
        ("plain", "corners"),
        ("plain", "Square"),
    ]
    assert len(rows) == 8
    assert rows[0]["accuracy"] == 87.5
    assert all(0.0 <= row["accuracy"] <= 87.5 for row in rows)
    assert rows[2]["queries"] is None
    # the clean input, the start, and four windows
    assert 1.0 <= rows[3]["queries"] <= 6.0


def test_networks_are_trained_and_the_attacks_are_those_of_the_card():
    networks = benchmark.networks(train_rows=64, epochs=1)
    inputs, targets = benchmark.test_samples(16)
    assert inputs.shape == (16, 1, 28, 28)
    assert not torch.equal(networks["plain"].classifier.weight, networks["adversarial"].classifier.weight)
    attacks = benchmark.line_up(steps=2, n_queries=3, scale=50)
    assert list(attacks)[2:] == ["FGSM", "PGD-20", "PGD-50 x 5", "APGD-CE", "AutoAttack", "ZO-signSGD", "Square"]
    rows = benchmark.small_experiment(networks, (inputs, targets), attacks)
    assert len(rows) == 2 * (1 + len(attacks))
