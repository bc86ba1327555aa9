"""Results of small experiments as rows of named figures: what is refused, files, and the tables made of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.table_results import Column, TableResult, TableRow
from docs.generate import _figures

COLUMNS = {
    "robust": Column("Robust"),
    "gap": Column("Lost", "points"),
    "cost": Column("Time", "ratio"),
    "never": Column("Never", "number"),
}
ROWS = [
    TableRow("AT", 1, "large", {"robust": 0.5, "gap": 0.1, "cost": 1.0}),
    TableRow("AT", 2, "large", {"robust": 0.6, "gap": 0.2, "cost": 1.5}),
    TableRow("ERM", 1, "large", {"robust": 0.0, "gap": 0.1, "cost": None}),
    TableRow("ERM", 2, "large", {"robust": 0.1, "gap": 0.3, "cost": 0.1}),
    TableRow("none", 1, "large", {"robust": 0.1, "gap": 0.3, "cost": None}),
    TableRow("none", 2, "large", {"robust": 0.1, "gap": 0.3, "cost": None}),
    TableRow("AT", 1, "few", {"robust": 0.4, "gap": 0.0, "cost": 1.0}),
    TableRow("AT", 2, "few", {"robust": 0.4, "gap": 0.0, "cost": 1.0}),
]
ROWS = [TableRow(row.run, row.seed, row.scenario, {**row.values, "never": None}) for row in ROWS]


@pytest.fixture
def result():
    return TableResult(
        method="dat",
        experiment="words",
        config="a.yaml",
        hardware={"cpu": "A CPU", "cores": 2},
        versions={"torch": "2", "lightning": "2"},
        created="2026-11-25T10:00:00+00:00",
        seeds=[1, 2],
        columns=COLUMNS,
        rows=ROWS,
    )


def test_file_round_trip(result, tmp_path):
    assert TableResult.read(result.write(tmp_path / "a.json")) == result


def test_table_has_means_over_seeds(result, tmp_path):
    text = _figures(result.write(tmp_path / "a.json"))
    large, few = text.split("**Few**")
    assert large.startswith("**Large**")
    assert "| AT | 55.0 (50.0, 60.0) | 15.0 | 1.25 | not measured |" in large
    assert "| ERM | 5.0 (0.0, 10.0) | 20.0 | not measured | not measured |" in large
    # what there is for other runs alone
    assert "| none | 10.0 (10.0, 10.0) | 30.0 |  | not measured |" in large
    assert "| AT | 40.0 (40.0, 40.0) | 0.0 | 1.00 | not measured |" in few
    assert "A CPU" in few


def test_what_is_no_result_is_refused(result, tmp_path):
    with pytest.raises(ValueError, match="to hold at least one run"):
        replace(result, rows=[])
    with pytest.raises(ValueError, match=r"those of the rows, but they differ in \[3\]"):
        replace(result, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match=r"'ERM' to have the columns"):
        replace(result, rows=[*ROWS, TableRow("ERM", 1, "few", {"robust": 0.1})])
    with pytest.raises(ValueError, match=r"`unit` to be one of .* but got 'metres'"):
        Column("Length", "metres")
    path = result.write(tmp_path / "a.json")
    content = json.loads(path.read_text())
    for broken, words in (({"rows": [{"strange": 1}]}, "fields of a result"), ({"kind": "other"}, "other")):
        path.write_text(json.dumps({**content, **broken}))
        with pytest.raises(ValueError, match=words):
            TableResult.read(path)
    content.pop("columns")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lacks \['columns'\]"):
        TableResult.read(path)


def test_measured_here_says_where_and_with_what():
    found = TableResult.measured_here("dat", "words", ROWS, columns=COLUMNS)
    assert (found.config, found.seeds) == ("configs/adversarial/dat.yaml", [1, 2])
    assert found.versions["torch"] == torch.__version__
    assert found.hardware["cores"] >= 1
    with pytest.raises(ValueError, match="'dta'"):
        TableResult.measured_here("dta", "words", ROWS, columns=COLUMNS)
