"""Records on disk become scenarios, each with one reference and one yardstick."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_trust.report import collect


def test_folders_files_and_globs_are_found_once(tmp_path, make_record):
    make_record("Retrain", role="retrain").write(tmp_path / "a" / "retrain")
    make_record("SalUn").write(tmp_path / "a" / "deep" / "salun")
    (tmp_path / "a" / "deep" / "salun" / "last.ckpt").write_text("no record")
    everything = ["Retrain", "SalUn"]
    for paths in (
        [tmp_path],
        [tmp_path / "a" / "retrain", tmp_path / "a" / "deep"],
        [tmp_path / "a" / "retrain" / "run.json", str(tmp_path / "a" / "*" / "salun" / "*")],
        [str(tmp_path / "**" / "run.json"), tmp_path],
    ):
        (scenario,) = collect(paths).scenarios
        assert sorted(record.label for record in scenario.records) == everything


def test_nothing_found_says_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"at least one run.json, but found none in .*`UnlearningReport`"):
        collect([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"but there is no .*absent"):
        collect([tmp_path / "absent"])


def test_a_damaged_record_costs_only_itself(tmp_path, make_record):
    make_record("SalUn").write(tmp_path / "good")
    path = make_record("FineTune").write(tmp_path / "bad")
    path.write_text(path.read_text()[:100])
    collection = collect([tmp_path])
    assert [record.label for record in collection.scenarios[0].records] == ["SalUn"]
    assert list(collection.damaged) == [path]
    assert "damaged" in collection.damaged[path]
    with pytest.raises(ValueError, match=r"No run record could be read:\n.*damaged"):
        collect([path])


def test_reference_is_the_first_retrain_by_path_and_the_second_is_the_yardstick(tmp_path, make_record):
    make_record("SalUn", UA=8.0).write(tmp_path / "a")
    make_record("Retrain", role="retrain", seed=2, UA=10.0).write(tmp_path / "b")
    make_record("Retrain", role="retrain", seed=1, UA=12.0).write(tmp_path / "c")
    (scenario,) = collect([tmp_path]).scenarios
    assert scenario.reference is not None
    assert scenario.reference.seed == 2
    assert scenario.spread == pytest.approx(0.5)
    rows = {row.label: row for row in scenario.rows()}
    assert rows["SalUn"].gap == pytest.approx(0.5)
    assert rows["SalUn"].differences == pytest.approx({"UA": -2.0, "RA": 0.0, "TA": 0.0, "MIA": 0.0})
    assert rows["SalUn"].share == pytest.approx(4.5 / 4.5)
    assert rows["Retrain, seed 2"].reference
    assert rows["Retrain, seed 2"].gap == 0


def test_methods_are_sorted_by_gap_after_original_and_retrain(tmp_path, make_record):
    make_record("Far", UA=50.0).write(tmp_path / "a")
    make_record("Near", UA=9.0).write(tmp_path / "b")
    make_record("Retrain", role="retrain", UA=10.0).write(tmp_path / "c")
    (scenario,) = collect([tmp_path]).scenarios
    assert [row.label for row in scenario.rows()] == ["Original", "Retrain", "Near", "Far"]
    best = scenario.best()
    assert best is not None
    assert best.label == "Near"


def test_without_retrain_nothing_is_measured(tmp_path, make_record):
    make_record("SalUn").write(tmp_path)
    (scenario,) = collect([tmp_path]).scenarios
    assert (scenario.reference, scenario.spread, scenario.best()) == (None, None, None)
    assert all((row.gap, row.differences, row.share) == (None, None, None) for row in scenario.rows())


def test_forget_sets_are_never_mixed(tmp_path, make_record):
    make_record("Retrain", role="retrain", hash="one").write(tmp_path / "a")
    make_record("SalUn", hash="two-is-long").write(tmp_path / "b")
    make_record("SalUn", hash="three", scenario="class 0").write(tmp_path / "c")
    collection = collect([tmp_path])
    assert [each.name for each in collection.scenarios] == ["class 0", "random 10 % (one)", "random 10 % (two-is-l)"]
    assert [each.reference is None for each in collection.scenarios] == [True, False, True]


def test_runs_of_one_name_are_told_apart_by_seed_or_folder(tmp_path, make_record):
    make_record("SalUn", seed=1).write(tmp_path / "x")
    make_record("SalUn", seed=1).write(tmp_path / "y")
    make_record("SalUn", seed=2).write(tmp_path / "z")
    (scenario,) = collect([tmp_path]).scenarios
    labels = sorted(row.label for row in scenario.rows() if row.kind == "method")
    assert labels == ["SalUn, seed 2", "SalUn, x", "SalUn, y"]


def test_two_trained_models_are_two_originals(tmp_path, make_record):
    make_record("SalUn").write(tmp_path / "a")
    make_record("FineTune").write(tmp_path / "b")
    other = {"UA": 2.0, "RA": 98.0, "TA": 90.0, "MIA": 4.0}
    make_record("L1Sparse", before=other).write(tmp_path / "c")
    (scenario,) = collect([tmp_path]).scenarios
    originals = [row.label for row in scenario.rows() if row.kind == "original"]
    assert originals == ["Original of SalUn, FineTune", "Original of L1Sparse"]


def test_relative_paths(tmp_path, make_record, monkeypatch):
    make_record("SalUn").write(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (scenario,) = collect(["runs"]).scenarios
    assert scenario.runs[0].path == Path("runs") / "run.json"
    assert os.fspath(scenario.runs[0].path) == os.path.join("runs", "run.json")
