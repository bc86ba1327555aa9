"""Bootstrap intervals over groups against SciPy's: rows, ratios of group sums, copies; bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from lightning_trust.functional.adversarial import group_bootstrap_interval

GENERATOR = np.random.default_rng(0)


def scipys(data, statistic, confidence=0.95, resamples=4000, **arguments):
    found = bootstrap(
        data,
        statistic,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(1),
        **arguments,
    ).confidence_interval
    return found.low, found.high


def mean_of(values):
    values = torch.as_tensor(values)
    return lambda rows: float(values[rows].double().mean())


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_groups_of_one_row_are_the_usual_bootstrap(confidence):
    values = GENERATOR.normal(size=150)
    # any numbers will do as groups
    found = group_bootstrap_interval(mean_of(values), torch.randperm(150) * 7, 4000, confidence)
    expected = scipys((values,), np.mean, confidence)
    # Monte Carlo errors of both ends are about 0.004
    assert found == pytest.approx(expected, abs=0.015)
    assert 0.2 < found[1] - found[0] < 0.4


def test_area_under_the_curve_has_scipys_interval():
    true = np.arange(60) % 3 == 0
    logits = GENERATOR.normal(size=60) + true
    found = group_bootstrap_interval(
        lambda rows: float(roc_auc_score(true[rows.numpy()], logits[rows.numpy()])), torch.arange(60), 800
    )
    expected = scipys((true, logits), roc_auc_score, resamples=800, paired=True, vectorized=False)
    assert found == pytest.approx(expected, abs=0.03)


def test_groups_of_unequal_size_are_drawn_whole():
    sizes = GENERATOR.integers(1, 9, 60)
    groups = np.repeat(np.arange(60), sizes)
    values = GENERATOR.random(len(groups)) < np.repeat(GENERATOR.random(60), sizes)
    sums = np.bincount(groups, values)
    expected = scipys(
        (sums, sizes), lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis), paired=True, vectorized=True
    )
    # rows of a group do not stand side by side
    order = GENERATOR.permutation(len(groups))
    found = group_bootstrap_interval(mean_of(values[order]), torch.as_tensor(groups[order]), 4000)
    assert found == pytest.approx(expected, abs=0.01)
    by_rows = group_bootstrap_interval(mean_of(values[order]), torch.arange(len(groups)), 4000)
    assert by_rows[1] - by_rows[0] < 0.85 * (found[1] - found[0])


def test_copies_tell_nothing_new():
    values = GENERATOR.random(40)
    nine = np.repeat(values, 9)
    single = group_bootstrap_interval(mean_of(values), torch.arange(40))
    copies = group_bootstrap_interval(mean_of(nine), torch.arange(40).repeat_interleave(9))
    assert copies == pytest.approx(single)
    rows = group_bootstrap_interval(mean_of(nine), torch.arange(360))
    # the standard error of a mean of nine times as many
    assert (copies[1] - copies[0]) / (rows[1] - rows[0]) == pytest.approx(3.0, rel=0.15)


def test_seed_decides():
    ends = [group_bootstrap_interval(mean_of(torch.arange(30)), torch.arange(30), 50, seed=seed) for seed in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]


def test_resamples_without_a_figure_are_left_out():
    def one_only(rows):
        return 5.0 if 0 in rows.tolist() else math.nan

    with pytest.warns(UserWarning, match=r"^\d+ of 200 resamples are left out"):
        assert group_bootstrap_interval(one_only, torch.arange(3), 200) == (5.0, 5.0)
    with pytest.warns(UserWarning, match="200 of 200"):
        assert all(map(math.isnan, group_bootstrap_interval(lambda rows: math.nan, torch.arange(3), 200)))
    # one patient tells nothing of how patients differ
    assert all(map(math.isnan, group_bootstrap_interval(one_only, torch.zeros(5, dtype=torch.int64))))


def test_bad_input():
    with pytest.raises(ValueError, match="`resamples` to be at least 1, but got 0"):
        group_bootstrap_interval(mean_of([1.0]), torch.arange(1), 0)
    for confidence in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(ValueError, match=r"`confidence` to be in \(0, 1\)"):
            group_bootstrap_interval(mean_of([1.0]), torch.arange(1), confidence=confidence)
    for groups in (torch.rand(3), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"`groups` to be integers of shape \(N,\)"):
            group_bootstrap_interval(mean_of([1.0]), groups)
