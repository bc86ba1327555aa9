"""The YAML of docs/adversarial/advmoe.md runs through the command line."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from lightning_trust.cli import main
from lightning_trust.nn import MoENetwork

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/adversarial/advmoe.md").read_text(encoding="utf-8")


def test_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    content = yaml.safe_load(block)
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
