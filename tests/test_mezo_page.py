"""The experiment of MeZO's page runs, and its numbers are what they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import mezo
from lightning_trust.cli import main
from lightning_trust.modules import CausalLanguageModel
from tests.two_ranks import assert_equal_states

CONFIGS = Path(__file__).parents[1] / "configs" / "zeroth_order"

pytest.importorskip("transformers")
pytest.importorskip("peft")


def test_every_run_has_its_forward_passes(tmp_path):
    start = mezo.pretrained(tmp_path, 2, 32)
    settings = {"budgets": (4, 9), "train_rows": 32, "val_rows": 8, "test_rows": 8}
    found = list(mezo.rows_of(start, [1], **settings))
    assert [row["run"] for row in found] == list(mezo.RUNS)
    # a step has one pass, two, or three; the first step of those that estimate sees that a loss is the same twice
    assert [row["steps"] for row in found] == [9, 4, 4, 3]
    assert all(row["passes"] in (9, 10) for row in found)
    assert [row["trained"] for row in found] == [640, 640, 98752, 640]
    # all start from the same network
    assert len({row["accuracy"][0] for row in found}) == 1
    result = mezo.result(found)
    assert [row.run for row in result.rows] == [run.name for run in mezo.RUNS.values()]
    assert set(result.columns) == {"accuracy_0", "accuracy_4", "accuracy_9", "trained"}


def test_both_runs_of_the_configurations_and_what_they_leave(tmp_path, monkeypatch):
    """Pre-trained, fine-tuned by an adapter, loaded without what either came from."""
    monkeypatch.chdir(tmp_path)
    peft = pytest.importorskip("peft")
    few = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    few += [f"--data.init_args.{name}={rows}" for name, rows in (("train_rows", 64), ("val_rows", 8), ("test_rows", 8))]
    first = main(["fit", f"--config={CONFIGS / 'mezo_pretraining.yaml'}", *few]).model
    second = main(["fit", f"--config={CONFIGS / 'mezo.yaml'}", *few]).model
    runs = Path("runs", "zeroth_order")
    loaded = CausalLanguageModel.load_from_checkpoint(runs / "mezo_pretraining" / "checkpoints" / "last.ckpt")
    assert_equal_states(loaded.state_dict(), first.state_dict())
    adapted = peft.PeftModel.from_pretrained(loaded.network, runs / "mezo" / "adapter").eval()
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(adapted(tokens).logits, second.eval()(tokens))
    shutil.rmtree(runs / "mezo_pretraining")
    loaded = CausalLanguageModel.load_from_checkpoint(runs / "mezo" / "checkpoints" / "last.ckpt")
    assert_equal_states(loaded.state_dict(), second.state_dict())


def test_accuracy_is_that_of_the_module(tmp_path):
    start = mezo.pretrained(tmp_path, 2, 32)
    found = mezo.measured(mezo.RUNS["adamw"], 1, start, (3,), train_rows=48, val_rows=8, test_rows=40)
    torch.manual_seed(0)
    host = mezo.CausalLanguageModel(str(start), lora=mezo.ADAPTER)
    data = mezo.CodeOrProse(train_rows=48, val_rows=8, test_rows=40)
    (measured,) = mezo.pl.Trainer(**mezo.SILENT).test(host, data, verbose=False)
    assert measured["test/acc"] == pytest.approx(found["accuracy"][0])
