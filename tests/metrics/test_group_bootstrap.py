"""A metric with its interval over groups: the figures of SciPy and of plain metrics, ranks and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from torchmetrics.classification import MulticlassAccuracy

from lightning_trust.metrics import GroupBootstrap, MacroAUROC
from tests.two_ranks import run_on_two_ranks


def accuracy():
    return MulticlassAccuracy(3, average="micro")


def rows(patients=30, images=3):
    """Images of a patient that are all right or all wrong."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (patients,), generator=generator)
    preds = torch.where(torch.rand(patients, generator=generator) < 0.7, targets, (targets + 1) % 3)
    groups = torch.arange(patients)
    return tuple(part.repeat(images) for part in (preds, targets, groups))


def test_interval_over_patients_is_scipys():
    preds, targets, groups = rows()
    metric = GroupBootstrap(accuracy(), resamples=600)
    # a patient is in several batches
    for batch in range(0, 90, 20):
        metric.update(preds[batch : batch + 20], targets[batch : batch + 20], groups[batch : batch + 20])
    found = metric.compute()
    right = (preds == targets)[:30].numpy().astype(float)
    expected = bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert found["value"].item() == pytest.approx(right.mean())
    # of 30 patients: steps of 1/30
    assert found["low"].item() == pytest.approx(expected.low, abs=0.04)
    assert found["high"].item() == pytest.approx(expected.high, abs=0.04)
    by_rows = GroupBootstrap(accuracy(), resamples=600)
    by_rows.update(preds, targets, torch.arange(90))
    narrow = by_rows.compute()
    assert (found["high"] - found["low"]).item() > 1.4 * (narrow["high"] - narrow["low"]).item()


def test_several_labels_and_a_metric_that_is_left_alone():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(40, 2, generator=generator), (torch.rand(40, 2, generator=generator) < 0.4).float()
    inner = MacroAUROC()
    metric = GroupBootstrap(inner, resamples=50)
    metric.update(logits, targets, torch.arange(40) // 2)
    found = metric.compute()
    plain = MacroAUROC()
    plain.update(logits, targets)
    assert found["value"].item() == pytest.approx(plain.compute().item())
    assert 0.0 < found["low"] < found["value"] < found["high"] < 1.0
    assert inner.sync_on_compute
    assert not len(inner.logits)
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert all(map(math.isnan, metric.compute().values()))


def test_two_ranks_see_all_patients(tmp_path):
    preds, targets, groups = rows()
    whole = GroupBootstrap(accuracy(), resamples=100)
    # the order of the rows that the ranks hold
    order = torch.cat([torch.arange(0, 90, 2), torch.arange(1, 90, 2)])
    whole.update(preds[order], targets[order], groups[order])
    expected = whole.compute()

    def measured(rank):
        metric = GroupBootstrap(accuracy(), resamples=100)
        metric.update(preds[rank::2], targets[rank::2], groups[rank::2])
        return metric.compute()

    for found in run_on_two_ranks(tmp_path, measured):
        assert found == expected


def test_bad_input():
    with pytest.raises(ValueError, match="`metric` to be a torchmetrics.Metric, but got str"):
        GroupBootstrap("accuracy")
    with pytest.raises(ValueError, match="`resamples`"):
        GroupBootstrap(accuracy(), resamples=0)
    with pytest.raises(ValueError, match="`confidence`"):
        GroupBootstrap(accuracy(), confidence=95.0)
    metric = GroupBootstrap(accuracy())
    preds, targets, groups = rows()
    for bad in (groups[1:], groups.float(), groups[:, None]):
        with pytest.raises(ValueError, match=r"`groups` to be integers of shape \(N,\), but got shapes"):
            metric.update(preds, targets, bad)
    metric = GroupBootstrap(MulticlassAccuracy(3, average="none"))
    metric.update(preds, targets, groups)
    with pytest.raises(ValueError, match="`metric` to compute one number"):
        metric.compute()
