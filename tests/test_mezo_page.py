"""The experiment of MeZO's page runs, and its numbers are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import mezo

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


def test_accuracy_is_that_of_the_module(tmp_path):
    start = mezo.pretrained(tmp_path, 2, 32)
    found = mezo.measured(mezo.RUNS["adamw"], 1, start, (3,), train_rows=48, val_rows=8, test_rows=40)
    torch.manual_seed(0)
    host = mezo.CausalLanguageModel(str(start), lora=mezo.ADAPTER)
    data = mezo.CodeOrProse(train_rows=48, val_rows=8, test_rows=40)
    (measured,) = mezo.pl.Trainer(**mezo.QUIET).test(host, data, verbose=False)
    assert measured["test/acc"] == pytest.approx(found["accuracy"][0])
