"""The report from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_trust.cli import main


def test_report_prints_tables_and_writes_page_and_markdown(tmp_path, make_record, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    make_record("Retrain", role="retrain").write("runs/retrain")
    make_record("SalUn").write("runs/salun")
    assert main(["report", "runs", "--output", "out/page.html", "--markdown=out/table.md"]) is None
    text = capsys.readouterr().out
    assert "Forget random 10 %" in text
    assert "Page: out/page.html" in text
    assert "<h1>Unlearning report</h1>" in Path("out/page.html").read_text(encoding="utf-8")
    assert "| **SalUn** |" in Path("out/table.md").read_text(encoding="utf-8")


def test_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        main(["report", str(tmp_path / "nowhere")])
