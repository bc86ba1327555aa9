"""Fairness of groups against loops, limits, fairlearn, ranks and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_trust.metrics import DemographicParityGap, EqualizedOddsGap, WorstGroupAccuracy
from tests.two_ranks import run_on_two_ranks

METRICS = (DemographicParityGap, EqualizedOddsGap, WorstGroupAccuracy)


def answers(rows=301, num_groups=2, num_classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes, (rows,), generator=generator)
    groups = torch.randint(num_groups, (rows,), generator=generator)
    # uneven groups, and predictions that lean on both
    groups = torch.where(torch.rand(rows, generator=generator) < 0.3, 0, groups)
    logits = torch.randn(rows, num_classes, generator=generator)
    logits = logits + torch.nn.functional.one_hot(targets, num_classes)
    logits[:, 0] += 0.8 * groups
    return logits, targets, groups


def by_hand(logits, targets, members, num_classes):
    """The formulas, sample by sample; ``members`` lists the rows of each group."""
    predicted, targets = logits.argmax(dim=1).tolist(), targets.tolist()

    def rate(rows, event):
        return sum(map(event, rows)) / len(rows)

    def deviation(event, among):
        of_all = rate(among, event)
        return np.mean([abs(of_all - rate([row for row in among if row in set(rows)], event)) for rows in members])

    everyone = list(range(len(targets)))
    gaps = [per_class(k, predicted, targets, everyone, deviation) for k in range(num_classes)]
    cells = [[row for row in rows if targets[row] == k] for rows in members for k in range(num_classes)]
    worst = min(rate(rows, lambda row: predicted[row] == targets[row]) for rows in cells)
    return np.mean([gap[0] for gap in gaps]), np.mean([gap[1] for gap in gaps]), worst


def per_class(k, predicted, targets, everyone, deviation):
    yes, no = [row for row in everyone if targets[row] == k], [row for row in everyone if targets[row] != k]
    parity = deviation(lambda row: predicted[row] == k, everyone)
    false_positive = deviation(lambda row: predicted[row] == k, no)
    false_negative = deviation(lambda row: predicted[row] != k, yes)
    return parity, (false_positive + false_negative) / 2


def rows_of(groups, num_groups):
    return [[row for row, group in enumerate(groups.tolist()) if group == g] for g in range(num_groups)]


@pytest.mark.parametrize(("num_groups", "num_classes"), [(2, 2), (3, 2), (2, 4), (3, 3)])
def test_equals_loops_over_samples(num_groups, num_classes):
    logits, targets, groups = answers(num_groups=num_groups, num_classes=num_classes)
    expected = by_hand(logits, targets, rows_of(groups, num_groups), num_classes)
    assert min(expected[:2]) > 0.02
    for kind, value in zip(METRICS, expected, strict=True):
        metric = kind(num_groups, num_classes)
        # uneven batches, one of them empty
        for rows in (slice(0, 7), slice(7, 7), slice(7, 200), slice(200, None)):
            metric.update(logits[rows], targets[rows], groups[rows])
        assert metric.compute().item() == pytest.approx(value, abs=1e-6)


def test_groups_that_overlap():
    logits, targets, _ = answers()
    members = torch.rand(len(targets), 3, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.2, 0.5, 0.9])
    expected = by_hand(logits, targets, [members[:, g].nonzero().flatten().tolist() for g in range(3)], 2)
    for kind, value in zip(METRICS, expected, strict=True):
        metric = kind(3)
        metric.update(logits, targets, members)
        assert metric.compute().item() == pytest.approx(value, abs=1e-6)


def test_two_groups_that_share_the_data():
    logits, targets, groups = answers()
    predicted = logits.argmax(dim=1)
    parity, odds = DemographicParityGap(), EqualizedOddsGap()
    for metric in (parity, odds):
        metric.update(logits, targets, groups)
    rate = [predicted[groups == g].float().mean() for g in range(2)]
    assert parity.compute().item() == pytest.approx(abs(rate[1] - rate[0]).item() / 2, abs=1e-6)
    wrong = [[(predicted != y)[(groups == g) & (targets == y)].float().mean() for g in range(2)] for y in range(2)]
    assert odds.compute().item() == pytest.approx(sum(abs(b - a).item() for a, b in wrong) / 4, abs=1e-6)


def test_limits():
    targets = torch.tensor([0, 1, 0, 1] * 5)
    groups = torch.tensor([0, 0, 1, 1] * 5)
    # what a constant, the group itself, and the class itself give
    for predicted, expected in ((torch.zeros(20), (0, 0, 0)), (groups, (0.5, 0.5, 0)), (targets, (0, 0, 1))):
        for kind, value in zip(METRICS, expected, strict=True):
            metric = kind()
            metric.update(predicted.long(), targets, groups)
            assert metric.compute() == value


def test_one_logit_is_two_classes():
    logits, targets, groups = answers()
    single = logits[:, 1] - logits[:, 0]
    for kind in METRICS:
        values = []
        for preds in (logits, single, single[:, None], logits.argmax(dim=1)):
            metric = kind()
            metric.update(preds, targets, groups)
            values.append(metric.compute().item())
        assert len(set(values)) == 1


def test_equals_fairlearn():
    fairlearn = pytest.importorskip("fairlearn.metrics")
    for seed in range(3):
        logits, targets, groups = answers(seed=seed)
        labels = logits.argmax(dim=1)
        parity = DemographicParityGap()
        parity.update(logits, targets, groups)
        difference = fairlearn.demographic_parity_difference(
            targets.numpy(), labels.numpy(), sensitive_features=groups.numpy()
        )
        assert 2 * parity.compute().item() == pytest.approx(difference, abs=1e-6)
    logits, targets, groups = answers(num_groups=3, seed=9)
    frame = fairlearn.MetricFrame(
        metrics={
            "fpr": fairlearn.false_positive_rate,
            "fnr": fairlearn.false_negative_rate,
        },
        y_true=targets.numpy(),
        y_pred=logits.argmax(dim=1).numpy(),
        sensitive_features=groups.numpy(),
    )
    expected = sum((frame.by_group[name] - frame.overall[name]).abs().mean() for name in ("fpr", "fnr")) / 2
    odds = EqualizedOddsGap(3)
    odds.update(logits, targets, groups)
    assert odds.compute().item() == pytest.approx(expected, abs=1e-6)


def test_collection_shares_the_counts():
    logits, targets, groups = answers()
    collection = MetricCollection({kind.__name__: kind() for kind in METRICS})
    collection.update(logits, targets, groups)
    collection.update(logits, targets, 1 - groups)
    assert collection.compute()["EqualizedOddsGap"] == pytest.approx(0.0, abs=1e-7)
    assert len(collection.compute_groups) == 1


def test_two_ranks_count_all_samples(tmp_path):
    logits, targets, groups = answers()
    expected = by_hand(logits, targets, rows_of(groups, 2), 2)

    def measured(rank):
        metrics = [kind() for kind in METRICS]
        rows = slice(None, 11) if rank == 0 else slice(11, None)
        for metric in metrics:
            metric.update(logits[rows], targets[rows], groups[rows])
        return [metric.compute().item() for metric in metrics]

    for found in run_on_two_ranks(tmp_path, measured):
        assert found == pytest.approx(expected, abs=1e-6)


def test_absent_groups_are_refused():
    zeros = torch.zeros(4, dtype=torch.int64)
    parity = DemographicParityGap(3)
    parity.update(zeros, zeros, torch.tensor([0, 2, 0, 2]))
    with pytest.raises(ValueError, match="DemographicParityGap needs samples of every group, .* 4 samples .* group 1"):
        parity.compute()
    for kind in METRICS[1:]:
        metric = kind()
        metric.update(zeros, torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 1]))
        with pytest.raises(ValueError, match=f"{kind.__name__} needs .* none of group 1 with class 1"):
            metric.compute()
    with pytest.warns(UserWarning, match="before the"), pytest.raises(ValueError, match="0 samples"):
        DemographicParityGap().compute()


def test_bad_input():
    logits, targets, groups = answers(rows=8)
    with pytest.raises(ValueError, match="`num_groups` .* at least 2, but got 1"):
        DemographicParityGap(1)
    with pytest.raises(ValueError, match="`num_classes` .* at least 2, but got 1"):
        WorstGroupAccuracy(2, 1)
    metric = DemographicParityGap()
    with pytest.raises(ValueError, match=r"`targets` to be in \[0, 2\), the number of classes, but got .* to 3"):
        metric.update(logits, targets.clone().fill_(3), groups)
    with pytest.raises(ValueError, match=r"`groups` to be in \[0, 2\), the number of groups, but got .* to 2"):
        metric.update(logits, targets, groups.clone().fill_(2))
    with pytest.raises(ValueError, match=r"`preds` to be logits of shape \(N, 2\) .* of shape \(8, 3\)"):
        metric.update(torch.zeros(8, 3), targets, groups)
    with pytest.raises(ValueError, match=r"`targets` to be integer classes of shape \(8,\)"):
        metric.update(logits, targets.float(), groups)
    with pytest.raises(ValueError, match=r"`groups` to be integers of shape \(8,\)"):
        metric.update(logits, targets, groups[:5])
    with pytest.raises(ValueError, match="zeros and ones only"):
        metric.update(logits, targets, torch.full((8, 2), 2))
    assert metric.overall.sum() == 0
