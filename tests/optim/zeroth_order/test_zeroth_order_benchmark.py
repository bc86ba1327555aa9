"""The benchmark of zeroth-order steps runs, and its figures are what they say."""

from __future__ import annotations

import sys

from benchmarks import zeroth_order
from lightning_trust.core.files import read_json


def test_mezo_step():
    # no times here: a machine under tests has no quiet core
    time, memory = zeroth_order.mezo_step(rounds=1, width=64, depth=3, batch_size=8)
    assert time["what"].startswith("MeZO step, 13,130 parameters, batch 8: time")
    assert memory["medians"]["largest"] == 64 * 64 * 4
    # what a step holds beside a forward pass is the memory of the largest tensor, and some scalars
    held = memory["medians"]["mezo"] - memory["medians"]["forward"]
    assert memory["medians"]["largest"] <= held <= memory["medians"]["largest"] + 8192
    assert memory["value"] < 1.3


def test_command(tmp_path, monkeypatch, capsys):
    rows = [{"what": "a", "value": 1.0, "bar": 1.1, "reached": True, "medians": {}}]
    monkeypatch.setattr(zeroth_order, "MEASURED", {"mezo": lambda rounds: rows * rounds})
    monkeypatch.setattr(sys, "argv", ["zeroth_order", "--rounds=2", f"--output={tmp_path / 'out.json'}"])
    zeroth_order.main()
    assert "a: 1.0 (bar 1.1)" in capsys.readouterr().out
    assert read_json(tmp_path / "out.json", "lightning_trust.zeroth_order", 1)["rows"] == rows * 2
