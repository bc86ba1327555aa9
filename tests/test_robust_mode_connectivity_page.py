"""The YAML of docs/adversarial/robust_mode_connectivity.md runs through the command line; so does its benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.robust_mode_connectivity import COLUMNS, EPS, NAMES, SMOKE, rows
from lightning_trust.callbacks import CurveEvaluation
from lightning_trust.cli import main
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import CurveNetwork

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adversarial" / "robust_mode_connectivity.md"
OVERLAY, CURVE, TUNING, VOTE = re.findall(
    r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
BASE = ROOT / "configs" / "fashion_mnist.yaml"
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
    Path("curve.yaml").write_text(CURVE)
    overlay = yaml.safe_load(OVERLAY)
    evaluation = overlay["trainer"]["callbacks+"][2]
    assert evaluation["class_path"] == CurveEvaluation.__name__
    evaluation["init_args"].update(num_points=3, export="best.safetensors", top_k=3)
    for attack in evaluation["init_args"]["attacks"].values():
        attack["init_args"]["steps"] = 2
    Path("overlay.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False))
    configs = [f"--config={path}" for path in (BASE, "curve.yaml", "overlay.yaml")]
    cli = main(["fit", *configs, *FLAGS, "--trainer.default_root_dir=runs/curve"])
    assert isinstance(cli.model.network, CurveNetwork)
    start = torch.load("runs/at_linf/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    trained = cli.model.state_dict()
    assert torch.equal(trained["network.network.classifier.weight"], start["network.classifier.weight"])
    assert cli.trainer.global_step == 1
    assert Path("runs/curve/curve_validate.json").is_file()
    best = cli.model.network.weights_at(next(c for c in cli.trainer.callbacks if isinstance(c, CurveEvaluation)).best_t)

    # a vote of the exported points, tested as it is
    Path("vote.yaml").write_text(VOTE)
    voted = main(["test", f"--config={BASE}", "--config=vote.yaml", *FLAGS])
    networks = voted.model.network.networks
    assert len(networks) == 3
    assert torch.equal(networks[0].classifier.weight, best["classifier.weight"])


def test_second_end_is_the_first_one_tuned(ends):
    Path("tuning.yaml").write_text(TUNING)
    cli = main(["fit", f"--config={BASE}", "--config=tuning.yaml", *FLAGS])
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
