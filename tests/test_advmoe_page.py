"""The YAML of docs/adversarial/advmoe.md runs through the command line; so does its benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from benchmarks.advmoe import COLUMNS, RUNS, inference, row
from lightning_trust.cli import main
from lightning_trust.nn import MoENetwork

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/adversarial/advmoe.md").read_text(encoding="utf-8")


def test_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)]
    (content,) = [block for block in blocks if "model" in block]
    content["data"]["init_args"] = {
        "root": str(ROOT / "data"),
        "train_rows": 16,
        "val_rows": 4,
        "test_rows": 4,
        "batch_size": 8,
    }
    content["model"]["init_args"]["network_args"]["ratio"] = 0.0625
    Path("run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    flags = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    cli = main(["fit", "--config=run.yaml", *flags])
    assert isinstance(cli.model.network, MoENetwork)
    assert cli.trainer.global_step == 2
    shares = [cli.trainer.callback_metrics[f"trust/expert_share/{expert}"].item() for expert in range(2)]
    assert sum(shares) == 1.0
    assert all(value.isfinite().all() for value in cli.model.state_dict().values())


@pytest.fixture(scope="module")
def costs():
    return inference(rounds=1, batch=4)


def test_what_networks_of_experts_save(costs):
    dense, thin, moe = (costs[kind]["resnet18_multiply_adds"] for kind in ("dense", "thin", "moe"))
    assert thin < moe < 0.3 * dense
    assert costs["dense"]["resnet18_time"] == 1.0


@pytest.mark.parametrize("name", list(RUNS))
def test_benchmark_gives_its_rows(name, costs, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = row(name, 1, costs, rows=16, epochs=1, test_rows=8, steps=1)
    assert list(found.values) == list(COLUMNS)
    for share in ("clean", "share", "routing"):
        assert 0.0 <= found.values[share] <= 1.0
    assert 0.0 <= found.values["robust"] <= found.values["pathway"] <= found.values["clean"]
    if RUNS[name].network == "moe":
        assert found.values["share"] >= 0.5
        assert found.values["multiply_adds"] == pytest.approx(1.435, abs=0.001)
    else:
        # one expert, and no decision to attack
        assert found.values["share"] == found.values["routing"] == 1.0
