"""The tables say what was measured, and that closer to Retrain is better."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lightning_trust.report import collect, markdown, print_collection


@pytest.fixture
def runs(tmp_path, make_record):
    make_record(
        "Retrain", role="retrain", seed=1, UA=9.5, MIA=13.0, seconds={"steps": 45.0, "passes": 0, "fit": 50}
    ).write(tmp_path / "retrain")
    make_record("Retrain", role="retrain", seed=2, UA=9.1, MIA=12.6).write(tmp_path / "retrain-2")
    make_record("SalUn").write(tmp_path / "salun")
    make_record("OneShotPruning + SalUn", UA=6.0, sparsity=0.9).write(tmp_path / "sparse")
    return tmp_path


def printed(paths, width):
    console = Console(file=io.StringIO(), width=width)
    print_collection(collect(paths), console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_table_shows_values_differences_gap_time_share_and_sparsity(runs, width):
    text = printed([runs], width)
    assert max(len(line) for line in text.splitlines()) <= width
    lines = text.splitlines()
    (salun,) = [place for place, line in enumerate(lines) if line.startswith("SalUn")]
    cells = " ".join(lines[salun : salun + (1 if width == 120 else 2)]).replace("\xa0", " ").split()
    for cell in ("8.0", "99.0", "91.0", "12.0", "-1.5", "0.0", "-1.0", "0.62", "4.5"):
        assert cell in cells
    assert "10 %" in lines[salun]
    assert "OneShotPruning + SalUn" in text
    assert "90 %" in text
    assert "…" not in text
    flowing = " ".join(text.split())
    assert "two Retrains differ by 0.20 points" in flowing
    assert "Closer to Retrain is better" in flowing
    assert "10 rows to forget, 9,000 to keep, 20 to test on" in flowing


@pytest.mark.parametrize("width", [80, 120])
def test_without_retrain_the_table_says_not_measured(tmp_path, make_record, width):
    make_record("SalUn").write(tmp_path)
    text = printed([tmp_path], width)
    assert text.count("not measured") == 3  # the original, the method, and the sentence below
    assert "No Retrain with this forget set" in text


def test_one_retrain_has_no_spread(tmp_path, make_record):
    make_record("Retrain", role="retrain").write(tmp_path / "a")
    make_record("SalUn").write(tmp_path / "b")
    text = " ".join(printed([tmp_path], 120).split())
    assert "Retrain spread not measured: it needs a second Retrain" in text


def test_damaged_records_are_named(runs):
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{")
    text = "".join(printed([runs], 120).split())
    assert f"Leftout:Expected{runs}/broken/run.json" in text


def test_markdown_has_the_same_rows(runs):
    (scenario,) = collect([runs]).scenarios
    text = markdown(scenario)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(scenario.rows())
    (salun,) = [line for line in lines if "**SalUn**" in line]
    assert "| 8.0 (-1.5) | 99.0 (0.0) | 91.0 (0.0) | 12.0 (-1.0) | **0.62** | 4.5 s | 10 % |" in salun
    assert "two Retrains differ by 0.20 points" in text


def test_markdown_cells_cannot_break_the_table(tmp_path, make_record):
    make_record("A | B").write(tmp_path)
    (scenario,) = collect([tmp_path]).scenarios
    assert "| A \\| B |" in markdown(scenario)
