"""The YAML of docs/adversarial/robust_mode_connectivity.md runs through the command line; so does its benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.robust_mode_connectivity import COLUMNS, EPS, NAMES, SMOKE, rows
from lightning_trust.callbacks import CurveEvaluation, LoadWeights
from lightning_trust.cli import main
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import CurveNetwork

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adversarial" / "robust_mode_connectivity.md"
CURVE, TUNING = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
FLAGS = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.init_args.train_rows=32",
    "--data.init_args.val_rows=8",
    "--data.init_args.test_rows=8",
    f"--data.init_args.root={ROOT / 'data'}",
]


@pytest.fixture
def ends(tmp_path, monkeypatch):
    """The checkpoints of two runs."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("at_linf", "at_l1")):
        torch.manual_seed(seed)
        path = Path("runs", name, "checkpoints", "last.ckpt")
        path.parent.mkdir(parents=True)
        torch.save({"state_dict": ImageClassifier().state_dict()}, path)


@pytest.mark.filterwarnings("error:The optimizer decays the bends")
def test_curve_is_trained_measured_and_exported(ends):
    content = yaml.safe_load(CURVE)
    evaluation = content["trainer"]["callbacks"][2]["init_args"]
    assert content["trainer"]["callbacks"][2]["class_path"] == CurveEvaluation.__name__
    evaluation["num_points"] = 3
    for attack in evaluation["attacks"].values():
        attack["init_args"]["steps"] = 2
    Path("curve.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    cli = main(["fit", "--config=curve.yaml", *FLAGS])
    assert isinstance(cli.model.network, CurveNetwork)
    start = torch.load("runs/at_linf/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    trained = cli.model.state_dict()
    assert torch.equal(trained["network.network.classifier.weight"], start["network.classifier.weight"])
    assert cli.trainer.global_step == 1
    assert Path("runs/curve/curve_validate.json").is_file()
    plain = ImageClassifier()
    loader = LoadWeights("runs/curve/best.safetensors")
    loader._load(plain)
    best = cli.model.network.weights_at(next(c for c in cli.trainer.callbacks if isinstance(c, CurveEvaluation)).best_t)
    assert torch.equal(plain.network.classifier.weight, best["classifier.weight"])


def test_second_end_is_the_first_one_tuned(ends):
    base = ROOT / "configs" / "fashion_mnist.yaml"
    Path("tuning.yaml").write_text(TUNING)
    cli = main(["fit", f"--config={base}", "--config=tuning.yaml", *FLAGS])
    names = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert names >= {"LoadWeights", "AdversarialTraining"}
    assert cli.trainer.global_step == 1


def test_benchmark_gives_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(rows((1,), SMOKE))
    assert [row.run for row in found] == list(NAMES.values())
    for row in found:
        values = row.values
        assert values.keys() == COLUMNS.keys()
        assert 0.0 <= values["union"] <= min(values[norm] for norm in EPS) <= values["clean"] <= 1.0
        assert values["mean"] == pytest.approx(sum(values[norm] for norm in EPS) / 3)
        assert values["seconds"] > 0.0
