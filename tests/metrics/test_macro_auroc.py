"""AUROC of several labels against scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from lightning_trust.metrics import MacroAUROC
from tests.two_ranks import run_on_two_ranks


def rows():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 3, generator=generator)
    logits[:, 1] = logits[:, 1].round()  # ties
    logits[:, 2] += 40.0  # a sigmoid makes all of these 1
    return logits, (torch.rand(50, 3, generator=generator) < 0.3).float()


def test_equals_scikit_learn_over_batches_with_ties_and_large_logits():
    logits, targets = rows()
    metric = MacroAUROC()
    metric.update(logits[:20], targets[:20])
    metric.update(logits[20:], targets[20:])
    assert metric.compute().item() == pytest.approx(roc_auc_score(targets, logits), abs=1e-6)


def test_labels_of_one_value_are_left_out_with_a_warning():
    logits, targets = rows()
    targets[:, 0], targets[:, 2] = 0.0, 1.0
    metric = MacroAUROC()
    metric.update(logits, targets)
    with pytest.warns(UserWarning, match=r"Labels \[0, 2\] have one value only"):
        found = metric.compute().item()
    assert found == pytest.approx(roc_auc_score(targets[:, 1], logits[:, 1]), abs=1e-6)
    metric.reset()
    metric.update(logits, torch.zeros_like(targets))
    with pytest.warns(UserWarning, match=r"Labels \[0, 1, 2\]"):
        assert math.isnan(metric.compute())


def test_two_ranks_count_all_samples(tmp_path):
    logits, targets = rows()

    def measured(rank):
        metric = MacroAUROC()
        metric.update(logits[rank::2], targets[rank::2])
        return metric.compute()

    for found in run_on_two_ranks(tmp_path, measured):
        assert found.item() == pytest.approx(roc_auc_score(targets, logits), abs=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"one shape \(N, K\), but got \(50, 3\) and \(50,\)"):
        MacroAUROC().update(rows()[0], rows()[1][:, 0])
