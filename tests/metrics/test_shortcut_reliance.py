"""Reliance on the shortcut against a loop, its limit cases, ranks and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_trust.datamodules import ShortcutFashionMNIST
from lightning_trust.metrics import ShortcutReliance
from tests.two_ranks import run_on_two_ranks


def answers():
    generator = torch.Generator().manual_seed(0)
    targets, other = (torch.randint(4, (61,), generator=generator) for _ in range(2))
    shown = torch.where(torch.rand(61, generator=generator) < 0.6, targets, other)
    logits = torch.randn(61, 4, generator=generator) + 2.0 * torch.nn.functional.one_hot(shown, 4)
    return logits, targets, shown


def by_hand(logits, targets, shown):
    groups = {True: [], False: []}
    for row, y, s in zip(logits.tolist(), targets.tolist(), shown.tolist(), strict=True):
        groups[y == s].append(row.index(max(row)) == y)
    return {name: sum(groups[key]) / len(groups[key]) for name, key in (("aligned", True), ("conflicting", False))}


def test_equals_a_loop_over_batches():
    data = answers()
    metric = ShortcutReliance()
    for rows in (slice(0, 20), slice(20, 20), slice(20, 61)):
        metric.update(*(tensor[rows] for tensor in data))
    expected = by_hand(*data)
    assert expected["aligned"] - expected["conflicting"] > 0.2
    found = metric.compute()
    assert found["aligned"].item() == pytest.approx(expected["aligned"])
    assert found["conflicting"].item() == pytest.approx(expected["conflicting"])
    assert found["reliance"].item() == pytest.approx(expected["aligned"] - expected["conflicting"])


def test_limits():
    _, targets, shown = answers()
    for follows, value in ((shown, 1.0), (targets, 0.0)):
        metric = ShortcutReliance()
        metric.update(torch.nn.functional.one_hot(follows, 4).float(), targets, shown)
        assert metric.compute()["reliance"] == value
    alone = ShortcutReliance()
    alone.update(torch.eye(4), torch.arange(4), torch.arange(4))
    assert alone.compute()["aligned"] == 1.0
    assert math.isnan(alone.compute()["reliance"])


def test_network_that_reads_the_planted_pattern_relies_on_it():
    data = ShortcutFashionMNIST(train_rows=50, val_rows=10, test_rows=300, amplitude=0.5, shifted=True)
    data.prepare_data()
    data.setup()
    assert {part: len(shown) for part, shown in data.shown.items()} == {"train": 50, "val": 10, "test": 300}
    rows, shown = data.test_dataset, data.shown["test"]
    assert (shown == rows.targets).float().mean().item() == pytest.approx(0.1, abs=0.06)
    metric = ShortcutReliance()
    metric.update(torch.einsum("nchw,kchw->nk", rows.images.float() / 255, data.patterns), rows.targets, shown)
    assert metric.compute()["reliance"] > 0.8


def test_two_ranks_count_all_samples(tmp_path):
    data = answers()

    def measured(rank):
        metric = ShortcutReliance()
        metric.update(*(tensor[rank * 11 :][: 11 if rank == 0 else None] for tensor in data))
        return metric.compute()

    expected = by_hand(*data)
    for found in run_on_two_ranks(tmp_path, measured):
        assert found["reliance"].item() == pytest.approx(expected["aligned"] - expected["conflicting"])


def test_bad_input():
    logits, targets, shown = answers()
    with pytest.raises(ValueError, match=r"\(N, K\), \(N,\) and \(N,\), but got \(61, 4\), \(61,\) and \(60,\)"):
        ShortcutReliance().update(logits, targets, shown[:60])
    with pytest.raises(ValueError, match=r"but got \(61, 4\), \(61, 2\) and \(61,\)"):
        ShortcutReliance().update(logits, targets[:, None].expand(61, 2), shown)
