"""The relative error against NumPy's norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trust.metrics import RelativeL2
from tests.two_ranks import run_on_two_ranks


def values():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 60, generator=generator)


def expected():
    preds, target = values().double().numpy()
    return np.linalg.norm(preds - target) / np.linalg.norm(target)


def test_batches_of_any_size_give_the_whole():
    preds, target = values()
    metric = RelativeL2()
    for rows in (slice(0, 1), slice(1, 50), slice(50, 60)):
        metric.update(preds[rows], target[rows])
    assert metric.compute().item() == pytest.approx(expected(), rel=1e-6)
    metric.reset()
    metric.update(target, target)
    assert metric.compute().item() == 0.0


def test_no_mean_of_batches():
    # a batch of small values must not count as much as one of large ones
    metric = RelativeL2()
    metric.update(torch.tensor([0.2]), torch.tensor([0.1]))
    metric.update(torch.tensor([10.0]), torch.tensor([10.0]))
    assert metric.compute().item() == pytest.approx(0.1 / (100.01) ** 0.5)


def test_two_ranks_give_the_whole(tmp_path):
    def error(rank):
        metric = RelativeL2()
        preds, target = values()[:, rank::2]
        metric.update(preds, target)
        return metric.compute().item()

    assert run_on_two_ranks(tmp_path / "ranks", error) == pytest.approx([expected()] * 2, rel=1e-6)


def test_small_differences_of_large_values_are_not_lost():
    metric = RelativeL2()
    for _ in range(1000):
        metric.update(torch.tensor([1e4 + 1.0]), torch.tensor([1e4]))
    assert metric.compute().item() == pytest.approx(1e-4, rel=1e-6)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"of the same shape, but got \(3, 1\) and \(3,\)."):
        RelativeL2().update(torch.zeros(3, 1), torch.zeros(3))
