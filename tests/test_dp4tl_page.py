"""The experiment of DP4TL's page runs, and its figures are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import dp4tl
from lightning_trust.datamodules import PruneResult


@pytest.fixture(scope="module")
def found():
    return list(dp4tl.rows_of([1], dp4tl.SMOKE))


def test_every_run_is_there_once_and_goes_on_where_it_was(found):
    pairs = [(row["run"], row["ratio"]) for row in found]
    assert pairs == [(run, ratio) for run, ratios in dp4tl.RUNS.items() for ratio in ratios]
    (row,) = dp4tl.rows_of([1], dp4tl.SMOKE, [row for row in found if row["run"] != "no pretraining"])
    assert row["ff"] == found[0]["ff"]


def test_what_is_kept_is_what_the_run_says(found):
    rows = {(row["run"], row["ratio"]): row for row in found}
    for ratio in dp4tl.RATIOS:
        assert len(rows["label mapping", ratio]["kept"]) == round(30 * ratio)
        # what is left is what the other order keeps
        best, worst = rows["label mapping", ratio]["kept"], rows["label mapping, reversed", ratio]["kept"]
        assert ratio > 0.5 or not set(best) & set(worst)
    assert rows["whole source", 1.0]["share"] == 1.0
    assert rows["Moderate", 0.4]["share"] == pytest.approx(0.4, abs=0.02)
    assert rows["no pretraining", 0.0]["lp"] is None


def test_result(found):
    result = dp4tl.result(found)
    assert len(result.rows) == 17
    values = {row.run: row.values for row in result.rows}
    assert list(values)[:3] == ["no pretraining", "whole source", "60 %: label mapping"]
    assert values["whole source"]["time"] == 1.0
    assert values["no pretraining"]["time"] is None
    assert values["40 %: label mapping"]["overlap"] is None


def test_overlap_is_the_jaccard_index_with_other_seeds():
    rows = [
        {"run": "label mapping", "ratio": 0.4, "seed": seed, "kept": kept}
        for seed, kept in ((1, [1, 2, 3]), (2, [2, 3, 4]), (3, [7, 8, 9]))
    ]
    assert dp4tl.overlap(rows[0], rows) == pytest.approx((2 / 4 + 0) / 2)


def test_upper_body_garments_are_counted_in_every_rotation():
    labels = torch.tensor([0, 10, 26, 1, 7, 29])
    result = PruneResult("P", "class", labels, labels[:1], torch.tensor([0, 1, 2, 4]), 6, "")
    assert dp4tl.upper_body_share(result, labels) == 0.75
