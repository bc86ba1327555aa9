"""Robustness records in tables, page and Markdown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_trust.cli import main
from lightning_trust.core.files import write_tensors
from lightning_trust.core.robustness_record import EXAMPLES_KIND, EXAMPLES_NAME, RobustnessRecord
from lightning_trust.functional.adversarial import wilson_interval
from lightning_trust.report import collect


def write(folder: Path, label: str, union: float, seed: int = 1, examples: bool = False) -> RobustnessRecord:
    accuracy = {}
    for name, value in (("clean", 0.9), ("pgd", union + 0.05), ("union", union)):
        low, high = wilson_interval(round(200 * value), 200)
        accuracy[name] = {"value": value, "low": low, "high": high}
    record = RobustnessRecord(
        label=label,
        seed=seed,
        samples=200,
        accuracy=accuracy,
        attacks={"pgd": {"attack": "PGD(eps=0.1)", "eps": 0.1, "norm": "linf", "seconds": 1.5}},
        curves={"pgd": [[0.0, 0.9], [0.05, 0.8]]},
        examples=EXAMPLES_NAME if examples else None,
        random=False,
        weights="abc",
        epochs=None,
        train_seconds=None,
        hardware={"cpu": "A CPU", "cores": 2, "accelerator": None, "memory_gib": 8.0},
        versions={"torch": "2.15"},
        created="2026-11-25T10:00:00+00:00",
    )
    record.write(folder)
    if examples:
        clean = torch.rand(3, 1, 6, 6)
        tensors = {
            "clean": clean,
            "targets": torch.tensor([1, 2, 3]),
            "adversarial/pgd": (clean + 0.1).clamp(0, 1),
            "predicted/pgd": torch.tensor([0, 2, 5]),
            "adversarial/autoattack": torch.cat([(clean[:1] + 0.1).clamp(0, 1), clean[1:]]),
            "predicted/autoattack": torch.tensor([0, 2, 3]),
        }
        write_tensors(folder / EXAMPLES_NAME, EXAMPLES_KIND, 1, tensors)
    return record


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    write(Path("runs/natural"), "natural", 0.01)
    write(Path("runs/trades"), "TRADES <b>", 0.6, examples=True)
    return tmp_path


def test_command_prints_and_writes(runs, capsys):
    main(["report", "runs", "--output", "page.html", "--markdown", "table.md"])
    text = capsys.readouterr().out
    assert re.search(r"TRADES <b>\s+90.0\s+65.0\s+60.0\s+53.1 to 66.5\s+200", text)
    assert text.index("TRADES") < text.index("natural")
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<h1>Robustness report</h1>" in page
    assert "TRADES &lt;b&gt; holds 60.0 % of its samples" in page
    assert "TRADES <b>" not in page
    assert "<td>60.0 <small>53.1 to 66.5</small></td>" in page
    assert page.count("data:image/png;base64,") == 2
    assert "1 as 0, 2 as 2, 3 as 5.</figcaption>" in page
    assert "1 as 0, 2 as 2, 3 as 3. Where nothing was added, the attack found nothing.</figcaption>" in page
    assert 'aria-label="Accuracy against the radius of the attack"' in page
    assert "| TRADES <b> | 90.0 | 65.0 | 60.0 | 53.1 to 66.5 | 200 |" in Path("table.md").read_text()


def test_both_kinds_stand_on_one_page(runs, make_record):
    make_record("Retrain", role="retrain").write("runs/retrain")
    make_record("SalUn").write("runs/salun")
    main(["report", "runs", "--output", "page.html"])
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<h1>Report</h1>" in page
    assert "Forget random 10 %" in page
    assert "holds 60.0 %" in page


def test_runs_of_one_label_are_told_apart(runs, capsys):
    write(Path("runs/trades2"), "TRADES <b>", 0.5, seed=2)
    main(["report", "runs", "--output", "page.html"])
    text = capsys.readouterr().out
    assert "TRADES <b>, seed 1" in text
    assert "TRADES <b>, seed 2" in text


def test_damaged_record_costs_its_own_line(runs):
    Path("runs/natural/robustness.json").write_text("{")
    Path("runs/trades", EXAMPLES_NAME).write_bytes(b"no tensors")
    collection = collect(["runs"])
    assert [run.record.label for run in collection.robust] == ["TRADES <b>"]
    assert len(collection.damaged) == 1
    main(["report", "runs", "--output", "page.html"])
    assert "cannot be read" in Path("page.html").read_text(encoding="utf-8")


def test_record_refuses_what_is_no_accuracy(tmp_path):
    record = write(tmp_path, "one", 0.5)
    assert RobustnessRecord.read(tmp_path) == record
    broken = {**record.accuracy, "union": {"value": 1.5, "low": 0.1, "high": 1.0}}
    with pytest.raises(ValueError, match=r"`accuracy.union.value` to be in \[0, 1\], but got 1.5"):
        RobustnessRecord(**{**record.__dict__, "accuracy": broken})
    with pytest.raises(ValueError, match="`accuracy` to have the keys"):
        RobustnessRecord(**{**record.__dict__, "attacks": {}})
