"""The experiment of fairness reprogramming runs, and its rows are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fairness_reprogram as experiment
from lightning_trust.core.wrapping import checksum

TINY = experiment.Budget(
    base_rows=300, base_epochs=1, tuning_rows=64, few_rows=64, epochs=1, test_rows=200, study_epochs=2
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(experiment, "LMBDAS", (0.0, 1.0))


def test_every_run_has_its_row(tmp_path, small):
    pytest.importorskip("fairlearn")
    found = list(experiment.rows_of([1], tmp_path, TINY))
    names = [row["run"] for row in found if row["scenario"] == experiment.GARMENTS]
    assert names == [
        "base (ERM)",
        "frame, lmbda 0",
        "frame, EO, lmbda 1",
        "frame, DP, lmbda 1",
        "patch, EO, lmbda 1",
        "fine-tuning (AdvPost, lmbda 0)",
        "AdvPost, EO, lmbda 1",
        "AdvIn, EO, lmbda 1",
        "thresholds by group, which must be known",
        "frame, EO, lmbda 1, 64 images",
        "AdvPost, EO, lmbda 1, 64 images",
    ]
    trained = {row["run"]: row["trained"] for row in found if row["scenario"] == experiment.GARMENTS}
    # a frame of 3 pixels and a patch of 8, in three colours; all weights
    assert trained["frame, lmbda 0"] == 3 * (28**2 - 22**2)
    assert trained["patch, EO, lmbda 1"] == 3 * 8**2
    assert trained["base (ERM)"] == trained["AdvPost, EO, lmbda 1"] == 33106
    assert {row["trained"] for row in found if row["run"].startswith("mask")} == {20}
    # rows that are known are not measured again, and are put in order
    assert list(experiment.rows_of([1], tmp_path, TINY, found)) == []
    made = experiment.result(found[::-1], TINY)
    assert [row.run for row in made.rows] == [row["run"] for row in found]
    assert set(made.columns) == set(experiment.COLUMNS)


def test_all_runs_of_a_seed_start_from_one_network(tmp_path):
    task = experiment.study(TINY, 1)
    first, again = (experiment.base_model(task, 1, tmp_path) for _ in range(2))
    assert checksum(first) == checksum(again)
    assert checksum(experiment.base_model(experiment.study(TINY, 2), 2, tmp_path)) != checksum(first)
    before = checksum(again.network)
    callback = experiment.reprogrammed(task, "mask and offset", "eo", 1.0, 1)
    found = experiment.tuned(task, 1, tmp_path, callback, None, 2)
    assert checksum(experiment.base_model(task, 1, tmp_path).network) == before
    x = torch.randn(4, 10)
    assert not torch.equal(callback.trigger(x), x)
    assert 0.0 <= found["worst_group"] <= found["accuracy"] <= 1.0
