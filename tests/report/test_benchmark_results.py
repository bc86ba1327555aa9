"""Results of benchmarks: means over seeds, files, and how they are made from run records."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.results import Result, ResultRow, result_of_runs, write_results
from lightning_trust.catalog import method

FIXED = {
    "method": "salun",
    "experiment": "words",
    "config": "a.yaml",
    "hardware": {"cpu": "A CPU", "cores": 2},
    "versions": {"torch": "2"},
    "created": "2026-11-23T10:00:00+00:00",
}


def made(rows, seeds=(1, 2)):
    return Result(**FIXED, seeds=list(seeds), rows=rows)


def test_summary_is_the_mean_over_seeds():
    rows = [
        ResultRow("SalUn", 1, "class 0", 10.0, 90.0, 80.0, 20.0, 0.5, 2.0, 1.0, 0.1),
        ResultRow("FineTune", 1, "class 0", 0.0, 91.0, 81.0, 10.0, 4.0, 2.0, 0.0, 0.2),
        ResultRow("SalUn", 2, "class 0", 20.0, 92.0, 82.0, 40.0, 1.0, 4.0, 2.0, 0.2),
    ]
    salun, fine_tune = made(rows).summary()
    assert salun == {
        "scenario": "class 0",
        "run": "SalUn",
        "UA": 15.0,
        "RA": 91.0,
        "TA": 81.0,
        "MIA": 30.0,
        "gap_mean": 0.75,
        "gap_per_seed": [0.5, 1.0],
        "seconds_mean": 4.5,
        "share_of_retrain_mean": 0.15,
        "sparsity": None,
    }
    # a mean over one of two seeds would be another figure
    assert fine_tune["gap_per_seed"] == [4.0, None]
    assert fine_tune["gap_mean"] is None


def test_file_round_trip_and_what_is_refused(tmp_path):
    path = made([ResultRow("SalUn", 1, "class 0", gap=1.0)], [1]).write(tmp_path / "a" / "salun.json")
    read = Result.read(path)
    assert (read.rows[0].gap, read.rows[0].UA, read.summary()[0]["gap_mean"]) == (1.0, None, 1.0)
    data = json.loads(path.read_text())
    assert (data["kind"], data["version"]) == ("lightning_trust.result", 1)
    for change, message in [
        ({"summary": [{**data["summary"][0], "gap_mean": 0.5}]}, "summary of .* to be that of its rows"),
        ({"rows": [{**data["rows"][0], "accuracy": 1.0}]}, "fields of a result, but: .*accuracy"),
        ({"kind": "other"}, "kind"),
    ]:
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=message):
            Result.read(path)
    del data["seeds"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"it lacks \['seeds'\]"):
        Result.read(path)


def test_rows_that_make_no_result_are_refused():
    with pytest.raises(ValueError, match="at least one run"):
        made([], [])
    with pytest.raises(ValueError, match=r"those of the rows, but they differ in \[2\]"):
        made([ResultRow("SalUn", 1, "class 0")])
    twice = made([ResultRow("SalUn", 1, "class 0"), ResultRow("SalUn", 1, "class 0")], [1])
    with pytest.raises(ValueError, match="one row of 'SalUn' a seed for 'class 0', but got 2"):
        twice.summary()


def test_results_of_records_have_each_methods_runs(tmp_path, make_record):
    start = {"UA": 0.0, "RA": 99.0, "TA": 91.0, "MIA": 12.0}
    retrain = make_record("ignored", role="retrain", seed=101)
    records = {
        "retrain": retrain,
        "retrain_again": replace(retrain, metrics={**retrain.metrics, "UA": 10.0}, seed=201),
        "fine_tune": make_record("FineTune", before=start),
        "salun": make_record("SalUn", UA=4.0, MIA=10.0, before=start),
        "pruned": make_record("x", RA=95.0, sparsity=0.8, before=start),
    }
    labels = {
        "retrain": "Retrain",
        "retrain_again": "Retrain (another seed)",
        "fine_tune": "FineTune",
        "salun": "SalUn",
        "pruned": "OneShotPruning + SalUn",
    }
    written = write_results(tmp_path, {7: {"random": records}}, labels)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "pruning/one_shot_pruning.json",
        "unlearning/fine_tune.json",
        "unlearning/salun.json",
    ]
    result = Result.read(tmp_path / "unlearning" / "salun.json")
    assert result.config == method("salun").config
    assert result.seeds == [7]
    gaps = {row.run: row.gap for row in result.rows}
    assert gaps == {
        "Original": 2.0,  # UA 0 instead of 8
        "Retrain": 0.0,
        "Retrain (another seed)": 0.5,
        "SalUn": 1.5,  # UA 4 instead of 8, MIA 10 instead of 12
        "OneShotPruning + SalUn": 1.0,
    }
    (row,) = [row for row in result.rows if row.run == "SalUn"]
    assert (row.steps_seconds, row.passes_seconds, row.share_of_retrain) == (4.0, 0.5, 1.0)
    pruned = Result.read(tmp_path / "pruning" / "one_shot_pruning.json")
    assert {row.run for row in pruned.rows} == {*gaps, "FineTune"}


def test_result_of_a_folder_of_runs(tmp_path, make_record):
    make_record("Retrain", role="retrain", seed=1).write(tmp_path / "retrain")
    make_record("Retrain", role="retrain", seed=2, UA=9.0).write(tmp_path / "retrain_again")
    make_record("SalUn", UA=6.0).write(tmp_path / "salun")
    result = result_of_runs(tmp_path, "demo", "words", "a.yaml")
    assert result.seeds == [1]
    # the model before: UA 1, RA 99.5, TA 92, MIA 3 against 8, 99, 91, 12
    gaps = {row.run: row.gap for row in result.rows}
    assert gaps == {"Original": 4.375, "Retrain": 0.0, "Retrain (another seed)": 0.25, "SalUn": 0.5}
    with pytest.raises(ValueError, match="to hold a Retrain, but there is none"):
        result_of_runs(tmp_path / "salun", "demo", "words", "a.yaml")
