"""The YAML of docs/adversarial/dat.md runs through the command line, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml

from lightning_trust.cli import main
from lightning_trust.modules import ImageClassifier
from lightning_trust.optim import LAMB

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/adversarial/dat.md").read_text(), re.DOTALL | re.MULTILINE)
ENTRIES = next(block for block in BLOCKS if block.startswith("trainer:"))
WHOLE = next(block for block in BLOCKS if "teacher_checkpoint" in block)
FLAGS = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def test_whole_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(WHOLE)
    content["trainer"]["strategy"] = "ddp_fork"
    for data, rows in ((content["data"], 32), (content["data_wrapper"]["init_args"]["unlabeled"], 48)):
        data["init_args"].update(train_rows=rows, val_rows=8, test_rows=8, root=str(ROOT / "data"))
    content["data"]["init_args"]["batch_size"] = 8
    teacher = Path(content["data_wrapper"]["init_args"]["teacher_checkpoint"])
    teacher.parent.mkdir(parents=True)
    torch.save({"state_dict": ImageClassifier().state_dict()}, teacher)
    Path("run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    torch.manual_seed(1)
    cli = main(["fit", "--config=run.yaml", *FLAGS])
    assert {type(callback).__name__ for callback in cli.trainer.callbacks} >= {
        "AdversarialTraining",
        "QuantizedAllReduce",
    }
    assert isinstance(cli.model._make_optimizer(cli.model.parameters()), LAMB)
    assert type(cli.datamodule).__name__ == "PseudoLabeledData"
    assert all(value.isfinite().all() for value in cli.model.state_dict().values())


def test_entries_for_a_run_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("entries.yaml").write_text(ENTRIES)
    base = ROOT / "configs" / "fashion_mnist.yaml"
    small = [
        f"--data.init_args.{name}={rows}" for name, rows in (("train_rows", 32), ("val_rows", 8), ("test_rows", 8))
    ]
    root = f"--data.init_args.root={ROOT / 'data'}"
    cli = main(["fit", f"--config={base}", "--config=entries.yaml", *FLAGS, *small, root])
    assert {type(callback).__name__ for callback in cli.trainer.callbacks} >= {
        "ModelCheckpoint",
        "AdversarialTraining",
        "QuantizedAllReduce",
    }
    assert cli.trainer.global_step == 1
