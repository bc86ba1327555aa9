"""Run records are whole or refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from lightning_trust.core.records import RunRecord, average_gap, hardware, versions


def a_record(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "label": "SalUn",
        "role": "method",
        "scenario": "random 10 %",
        "seed": 1,
        "forget": {"hash": "abc", "spec": "ForgetRandom(fraction=0.1)", "forget": 10, "retain": 90, "test": 20},
        "metrics": {"UA": 8.0, "RA": 99.0, "TA": 91.0, "MIA": 12.0},
        "before": {"UA": 1.0, "RA": 99.5, "TA": 92.0, "MIA": 3.0},
        "seconds": {"steps": 4.0, "passes": 0.5, "fit": 6.0},
        "confidence": {
            "edges": [0.0, 0.5, 1.0],
            "before": {"forget": [1, 9], "test": [3, 17]},
            "after": {"forget": [2, 8], "test": [3, 17]},
        },
        "membership": {"feature": "confidence", "rows": 20, "note": "SVC"},
        "sparsity": None,
        "parameters": 100,
        "hardware": {"cpu": "x", "cores": 2, "accelerator": None, "memory_gib": 8.0},
        "versions": {"torch": "2"},
        "created": "2026-11-23T10:00:00+00:00",
    }
    return RunRecord(**{**values, **changes})


def test_round_trip_by_file_and_by_folder(tmp_path: Path) -> None:
    record = a_record()
    path = record.write(tmp_path / "run")
    assert path == tmp_path / "run" / "run.json"
    assert RunRecord.read(path) == record
    assert RunRecord.read(path.parent) == record


def test_work_is_steps_and_passes() -> None:
    assert a_record().work == 4.5


def test_full_disk_leaves_no_half_written_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        a_record().write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_truncated_record_is_refused_by_name(tmp_path: Path) -> None:
    path = a_record().write(tmp_path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match="but it is damaged") as error:
        RunRecord.read(path)
    assert str(path) in str(error.value)


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    path = a_record().write(tmp_path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(ValueError, match="schema version 1 or older, but got 2"):
        RunRecord.read(path)


def test_missing_and_unknown_fields_are_listed(tmp_path: Path) -> None:
    path = a_record().write(tmp_path)
    data = json.loads(path.read_text())
    del data["seconds"]
    data["colour"] = "red"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"missing \['seconds'\], unknown \['colour'\]"):
        RunRecord.read(path)


def test_nan_in_a_file_is_refused_with_file_and_field(tmp_path: Path) -> None:
    path = a_record().write(tmp_path)
    path.write_text(path.read_text().replace("91.0", "NaN"))
    with pytest.raises(ValueError, match=r"`metrics.TA` to be a finite number, but got nan") as error:
        RunRecord.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"UA": float("nan"), "RA": 1, "TA": 1, "MIA": 1}}, "`metrics.UA` to be a finite number"),
        ({"metrics": {"UA": 101, "RA": 1, "TA": 1, "MIA": 1}}, r"`metrics.UA` to be in \[0, 100\], but got 101"),
        ({"metrics": {"UA": 1}}, r"`metrics` to have the key 'RA', but got the keys \['UA'\]"),
        ({"metrics": None}, "`metrics` to be a mapping, but got None"),
        ({"before": {"UA": "1", "RA": 1, "TA": 1, "MIA": 1}}, "`before.UA` to be a finite number, but got '1'"),
        ({"seconds": {"steps": -1.0, "passes": 0, "fit": 0}}, "`seconds.steps` to be at least 0, but got -1.0"),
        ({"role": "reference"}, "`role` to be one of"),
        ({"label": ""}, "`label` to be a string that is not empty"),
        ({"seed": 1.5}, "`seed` to be an integer"),
        ({"sparsity": 1.5}, r"`sparsity` to be in \[0, 1\]"),
        ({"parameters": True}, "`parameters` to be an integer"),
        ({"forget": {"hash": "", "spec": "s", "forget": 1, "retain": 1, "test": 1}}, "`forget.hash`"),
        ({"forget": {"hash": "h", "spec": "s", "forget": -1, "retain": 1, "test": 1}}, "`forget.forget`"),
        ({"confidence": {"edges": [0.0]}}, "`confidence.edges` to be a list of at least two"),
        ({"confidence": {"edges": [1.0, 0.0]}}, "`confidence.edges` to be ascending"),
        (
            {"confidence": {"edges": [0, 1], "before": None, "after": {"forget": [1, 2], "test": [1]}}},
            "`confidence.after.forget` to be a list of 1 counts",
        ),
        ({"confidence": {"edges": [0, 1], "before": None, "after": None}}, "`confidence.after` to be a mapping"),
        ({"membership": {"feature": "c", "rows": None, "note": ""}}, "`membership.rows`"),
        ({"versions": "2.0"}, "`versions` to be a mapping"),
    ],
)
def test_values_that_break_a_rule_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_record(**changes)


def test_average_gap_is_the_mean_of_absolute_differences() -> None:
    retrain = a_record(role="retrain", before=None, metrics={"UA": 9.0, "RA": 98.0, "TA": 90.5, "MIA": 12.0})
    assert average_gap(a_record(), retrain) == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert average_gap(retrain, retrain) == 0


def test_average_gap_refuses_another_forget_set() -> None:
    other = replace(a_record(), forget={**a_record().forget, "hash": "other"})
    with pytest.raises(ValueError, match=r"forget set of `record` \(abc\), but got other"):
        average_gap(a_record(), other)


def test_hardware_and_versions_are_ready_for_a_record() -> None:
    found = hardware(torch.device("cpu"))
    assert found["accelerator"] is None
    assert found["cpu"]
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["memory_gib"] is None or found["memory_gib"] > 0
    assert hardware(torch.device("meta"))["accelerator"] == "meta"
    assert versions()["torch"] == torch.__version__
    assert set(versions()) == {"python", "torch", "lightning", "lightning_trust"}
    assert a_record(hardware=found, versions=versions()).hardware["cores"] == found["cores"]
