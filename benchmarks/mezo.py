"""The small experiment of MeZO: a tiny language model is fine-tuned from forward passes alone.

    python -m benchmarks.mezo [--smoke | --tune]

A byte-level Llama is pre-trained to first order on packages of Python's standard library, for about a minute: MeZO
fine-tunes what is good already, it does not pre-train. Then it learns to tell code from prose in other packages, in
words (``CodeOrProse``), to first order and from forward passes, with an adapter and with all of its weights. Every run
gets as many forward passes; the backward passes of first order are not counted. Learning rates are the best of
:data:`RATES` on validation rows, which ``--tune`` prints. Writes benchmarks/results/zeroth_order/mezo.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.silent_trainer import SILENT
from benchmarks.table_results import Column, TableResult, TableRow
from lightning_trust.callbacks import ZerothOrderGradient
from lightning_trust.datamodules import CodeCorpus, CodeOrProse
from lightning_trust.modules import CausalLanguageModel
from lightning_trust.nn import LoRA
from lightning_trust.optim import RGE, MeZO

NETWORK = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
#: none of those that the passages come from
CORPUS = ("collections", "concurrent", "ctypes", "html", "json", "multiprocessing", "pydoc_data", "urllib", "wsgiref")
ADAPTER = LoRA(r=1, alpha=2.0, target_modules=["o_proj", "down_proj"])
#: forward passes after which the accuracy is looked at
BUDGETS = (800, 1600, 3200)


@dataclass(frozen=True)
class Run:
    """One way of fine-tuning: its optimizer, where gradients come from, and whether an adapter is trained."""

    name: str
    optimizer: partial[torch.optim.Optimizer]
    callbacks: Callable[[int], list[pl.Callback]] = field(default=lambda seed: [])
    lora: LoRA | None = ADAPTER


def _mezo(seed: int) -> list[pl.Callback]:
    # two forward passes a step
    return [ZerothOrderGradient(clean_forward=False)]


def _rge(seed: int) -> list[pl.Callback]:
    return [ZerothOrderGradient(RGE(q=1, mu=1e-2), seed=seed)]


RUNS: dict[str, Run] = {
    "adamw": Run("AdamW with back-propagation, LoRA", partial(torch.optim.AdamW, lr=0.01)),
    "mezo_lora": Run("MeZO, LoRA", partial(MeZO, lr=0.003, mu=1e-2), _mezo),
    "mezo": Run("MeZO, all weights", partial(MeZO, lr=1e-4, mu=1e-3), _mezo, None),
    "rge": Run("ZerothOrderGradient(RGE) with Adam, LoRA", partial(torch.optim.Adam, lr=0.01), _rge),
}


#: learning rates that are tried on validation rows
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (0.003, 0.01, 0.03),
    "mezo_lora": (0.003, 0.01, 0.03),
    "mezo": (3e-5, 1e-4, 3e-4),
    "rge": (0.003, 0.01, 0.03),
}


class Curve(pl.Callback):
    """Counts forward passes of the network, and looks at the accuracy at some of them."""

    def __init__(self, budgets: Sequence[int], on_validation: bool = False) -> None:
        self.left = list(budgets)
        self.on_validation = on_validation
        self.passes = 0
        self.found: dict[int, float] = {}
        self._counts = True

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen to the network."""
        self._look(trainer, pl_module, 0)
        pl_module.network.register_forward_hook(lambda *_: setattr(self, "passes", self.passes + self._counts))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look, and stop when the last budget is used up."""
        while self.left and self.passes >= self.left[0]:
            self._look(trainer, pl_module, self.left.pop(0))
        trainer.should_stop = not self.left

    @torch.no_grad()
    def _look(self, trainer: Any, host: Any, budget: int) -> None:
        self._counts = False
        host.eval()
        found, true = [], []
        data = trainer.datamodule
        for rows in data.val_dataloader() if self.on_validation else data.test_dataloader():
            found.append(host.predict_step(rows, 0))
            true.append((rows["input_ids"] * (rows["labels"] != -100)).sum(dim=1))
        host.train()
        self._counts = True
        words = data.test_dataset.candidates[torch.cat(found)]
        self.found[budget] = (words == torch.cat(true)).double().mean().item()


def pretrained(folder: Path, steps: int = 1500, rows: int | None = None) -> Path:
    """A checkpoint of the small network that has read some packages."""
    pl.seed_everything(0, verbose=False)
    host = CausalLanguageModel(config=NETWORK, optimizer=partial(torch.optim.AdamW, lr=3e-3), schedule="cyclic")
    data = CodeCorpus(CORPUS, max_length=96, batch_size=16, train_rows=rows)
    trainer = pl.Trainer(**SILENT, max_steps=steps, max_epochs=-1, limit_val_batches=0)
    trainer.fit(host, data)
    trainer.save_checkpoint(folder / "pretrained.ckpt")
    return folder / "pretrained.ckpt"


def measured(
    run: Run, seed: int, start: Path, budgets: Sequence[int] = BUDGETS, on_validation: bool = False, **rows: int
) -> dict[str, Any]:
    """Fine-tune once: accuracies in [0, 1] after each budget of forward passes, steps, trained weights, seconds."""
    pl.seed_everything(seed, verbose=False)
    host = CausalLanguageModel(str(start), lora=run.lora, optimizer=run.optimizer)
    curve = Curve(budgets, on_validation)
    trainer = pl.Trainer(**SILENT, max_epochs=-1, limit_val_batches=0, callbacks=[*run.callbacks(seed), curve])
    begin = time.perf_counter()
    trainer.fit(host, CodeOrProse(**rows))
    return {
        "accuracy": curve.found,
        "passes": curve.passes,
        "steps": trainer.global_step,
        "trained": sum(parameter.numel() for parameter in host.parameters() if parameter.requires_grad),
        "seconds": time.perf_counter() - begin,
    }


def rows_of(
    start: Path, seeds: Sequence[int] = (1, 2, 3), runs: Sequence[str] = tuple(RUNS), **settings: Any
) -> Iterator[dict[str, Any]]:
    """One dict a run and seed: ``run``, ``seed`` and what :func:`measured` gives."""
    for seed in seeds:
        for name in runs:
            yield {"run": name, "seed": seed, **measured(RUNS[name], seed, start, **settings)}


def tune(start: Path, runs: Sequence[str] = tuple(RUNS), seed: int = 11, **settings: Any) -> Iterator[dict[str, Any]]:
    """One dict a learning rate, with accuracies on validation rows; another seed than the table's."""
    for name in runs:
        for lr in RATES[name]:
            run = RUNS[name]
            tried = replace(run, optimizer=partial(run.optimizer.func, **{**run.optimizer.keywords, "lr": lr}))
            yield {"run": name, "lr": lr, **measured(tried, seed, start, on_validation=True, **settings)}


def result(found: Sequence[dict[str, Any]]) -> TableResult:
    """The rows as a result."""
    budgets = sorted({budget for row in found for budget in row["accuracy"]})
    heads = {budget: f"{budget:,} forward passes" if budget else "before" for budget in budgets}
    columns = {f"accuracy_{budget}": Column(heads[budget]) for budget in budgets}
    columns["trained"] = Column("Trained weights", "number")
    return TableResult.measured_here(
        "mezo",
        experiment="code or prose in Python's standard library, 2,000 rows, test accuracy on 1,000; a byte-level Llama"
        " of 98,752 weights, pre-trained to first order on other packages; batch 16; backward passes of AdamW are not"
        " counted",
        columns=columns,
        rows=[
            TableRow(
                RUNS[row["run"]].name,
                row["seed"],
                "code or prose",
                {
                    **{f"accuracy_{budget}": row["accuracy"].get(budget) for budget in budgets},
                    "trained": float(row["trained"]),
                },
            )
            for row in found
        ],
    )


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows and passes, one seed: to see that it runs")
    parser.add_argument("--tune", action="store_true", help="print what learning rates do on validation rows")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", default="benchmarks/results/zeroth_order/mezo.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    few: dict[str, Any] = {"budgets": (4, 8), "train_rows": 32, "val_rows": 8, "test_rows": 8}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        start = pretrained(Path(folder), 2, 32) if arguments.smoke else pretrained(Path(folder))
        if arguments.tune:
            for row in tune(start, arguments.runs):
                print(json.dumps(row), flush=True)
            return
        seeds = [1] if arguments.smoke else arguments.seeds
        for row in rows_of(start, seeds, arguments.runs, **(few if arguments.smoke else {})):
            print(json.dumps(row), flush=True)
            found.append(row)
    made = result(found)
    if not arguments.smoke:
        made.write(Path(arguments.output))


if __name__ == "__main__":
    main()
