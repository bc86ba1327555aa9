"""The small experiment of distributed adversarial training: large batches, few bits, few labels.

    python -m benchmarks.dat [--smoke | --tune]

Fashion-MNIST, a small CNN, linf radius 0.1, PGD-5 in training and PGD-20 in the test, two gloo ranks in this machine:

* ``batch``: batch 1,536 with LAMB, with SGD, and SGD at batch 128;
* ``bits``: a shorter LAMB run with gradients exchanged in 32 bits, in 8 bits, in 8 bits two-sided, and in 4;
* ``labels``: 1,000 labels alone, and with 10,000 more rows that a clean-trained teacher labelled.

:func:`rows` gives one dict a run; learning rates stand in :data:`RUNS`, each the best of :data:`RATES` on validation
rows, which ``--tune`` prints. Writes benchmarks/results/adversarial/dat.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

# before any operation: a process that has run threaded ones hangs once it is forked
torch.set_num_threads(1)

import lightning.pytorch as pl  # noqa: E402

from benchmarks.silent_trainer import SILENT  # noqa: E402
from benchmarks.table_results import Column, TableResult, TableRow  # noqa: E402
from lightning_trust.attacks import PGD  # noqa: E402
from lightning_trust.callbacks import AdversarialTraining, QuantizedAllReduce, RobustEvaluation  # noqa: E402
from lightning_trust.core.schedules import LinearWarmup, Product, Schedule, Steps  # noqa: E402
from lightning_trust.datamodules import FashionMNIST, PseudoLabeledData  # noqa: E402
from lightning_trust.modules import ImageClassifier  # noqa: E402
from lightning_trust.optim import LAMB  # noqa: E402

EPS = 0.1


@dataclass(frozen=True)
class Run:
    """One run: what differs between the rows of the table.

    ``batch`` is that of all ranks together, ``labels`` the number of rows with labels, ``pseudo`` of those without.
    """

    scenario: str
    optimizer: str
    lr: float
    batch: int
    labels: int = 12000
    pseudo: int = 0
    epochs: int = 4
    reduce: dict[str, Any] | None = field(default=None)


#: learning rates that are tried on validation rows
RATES: dict[str, tuple[float, ...]] = {
    "sgd_128": (0.05, 0.1),
    "sgd_1536": (0.1, 0.3, 0.6),
    "lamb_1536": (0.01, 0.02, 0.04, 0.08, 0.16),
}
RUNS: dict[str, Run] = {
    "sgd_128": Run("batch", "sgd", 0.1, 128, epochs=10),
    "sgd_1536": Run("batch", "sgd", 0.6, 1536, epochs=10),
    "lamb_1536": Run("batch", "lamb", 0.04, 1536, epochs=10),
    "lamb_1536_32_bits": Run("bits", "lamb", 0.04, 1536),
    "lamb_1536_8_bits": Run("bits", "lamb", 0.04, 1536, reduce={"bits": 8}),
    "lamb_1536_8_bits_two_sided": Run("bits", "lamb", 0.04, 1536, reduce={"bits": 8, "two_sided": True}),
    "lamb_1536_4_bits": Run("bits", "lamb", 0.04, 1536, reduce={"bits": 4}),
    "labels": Run("labels", "sgd", 0.1, 128, labels=1000),
    "labels_and_pseudo_labels": Run("labels", "sgd", 0.1, 128, labels=1000, pseudo=10000),
}
#: run -> its name in tables
NAMES = {
    "sgd_128": "SGD, batch 128",
    "sgd_1536": "SGD, batch 1,536",
    "lamb_1536": "LAMB, batch 1,536",
    "lamb_1536_32_bits": "LAMB, 32 bits",
    "lamb_1536_8_bits": "LAMB, 8 bits",
    "lamb_1536_8_bits_two_sided": "LAMB, 8 bits, two-sided",
    "lamb_1536_4_bits": "LAMB, 4 bits",
    "labels": "1,000 labels",
    "labels_and_pseudo_labels": "1,000 labels, 10,000 pseudo-labels",
}
SCENARIOS = {"batch": "large batches", "bits": "gradients in few bits", "labels": "few labels"}
COLUMNS = {
    "robust": Column("Robust (PGD-20)"),
    "clean": Column("Clean"),
    "bytes": Column("Bytes sent, of float32's", "ratio"),
}


class _Bytes(pl.Callback):
    """Brings the bytes sent out of the process of rank 0."""

    def __init__(self, path: Path, callback: QuantizedAllReduce) -> None:
        self.path = path
        self.callback = callback

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            found = {"bytes_sent": self.callback.bytes_sent, "bytes_float32": self.callback.bytes_float32}
            self.path.write_text(json.dumps(found))


def schedule(epochs: int) -> Schedule:
    """The card's: a warm-up, then three drops, shrunk to the length of the run."""
    warm = LinearWarmup(0.0, 1.0, epochs=max(1.0, epochs / 6))
    return Product([warm, Steps([1.0, 0.1, 0.01], milestones=[0.7 * epochs, 0.9 * epochs])])


def _optimizer(run: Run) -> Any:
    if run.optimizer == "lamb":
        return partial(LAMB, lr=run.lr)
    return partial(torch.optim.SGD, lr=run.lr, momentum=0.9, weight_decay=5e-4)


def _classifier(run: Run, seed: int) -> ImageClassifier:
    pl.seed_everything(seed, verbose=False)
    return ImageClassifier("SmallCNN", optimizer=_optimizer(run), schedule=schedule(run.epochs))


def _data(run: Run, seed: int, ranks: int, test_rows: int) -> pl.LightningDataModule:
    settings: dict[str, Any] = {"batch_size": run.batch // ranks, "val_rows": 1000, "test_rows": test_rows}
    labeled = FashionMNIST(train_rows=run.labels, **settings)
    if not run.pseudo:
        return labeled
    # fewer training rows are a part of more: the labels of these are hidden, and 1,000 of them are seen with labels too
    unlabeled = FashionMNIST(train_rows=run.labels + run.pseudo, **settings)
    teacher = _classifier(run, seed)
    trainer = pl.Trainer(**SILENT, max_epochs=2 * run.epochs, limit_val_batches=0)
    trainer.fit(teacher, datamodule=FashionMNIST(train_rows=run.labels, **{**settings, "batch_size": run.batch}))
    return PseudoLabeledData(labeled, unlabeled, teacher=teacher, unlabeled_fraction=0.5, seed=seed)


def measured(
    run: Run, seed: int, ranks: int = 2, steps: int = 5, test_rows: int = 1000, on_validation: bool = False
) -> dict[str, Any]:
    """Train and test one run: accuracies in [0, 1], seconds of the fit, bytes that a rank sent."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _data(run, seed, ranks, test_rows)
        classifier = _classifier(run, seed)
        callbacks: list[pl.Callback] = [AdversarialTraining(PGD(eps=EPS, steps=steps))]
        if run.reduce is not None:
            hook = QuantizedAllReduce(**run.reduce)
            callbacks += [hook, _Bytes(folder / "bytes.json", hook)]
        trainer = pl.Trainer(
            **SILENT,
            devices=ranks,
            strategy="ddp_fork" if ranks > 1 else "auto",
            max_epochs=run.epochs,
            limit_val_batches=0,
            callbacks=callbacks,
            default_root_dir=folder,
        )
        start = time.perf_counter()
        trainer.fit(classifier, datamodule=data)
        found: dict[str, Any] = {"seconds": time.perf_counter() - start}
        evaluation = RobustEvaluation({"pgd": PGD(eps=EPS, steps=20)}, folder=name)
        tester = pl.Trainer(**SILENT, devices=1, callbacks=[evaluation], default_root_dir=folder)
        look = tester.validate if on_validation else tester.test
        (result,) = look(classifier, datamodule=copy.copy(data), verbose=False)
        found["clean_acc"] = result["trust/clean_acc"]
        found["robust_acc"] = result["trust/robust_acc/pgd"]
        if (folder / "bytes.json").is_file():
            found.update(json.loads((folder / "bytes.json").read_text()))
        return found


def rows(
    seeds: tuple[int, ...] = (1, 2, 3), runs: dict[str, Run] | None = None, **settings: Any
) -> Iterator[dict[str, Any]]:
    """One dict a run and seed: ``run``, ``seed``, ``scenario`` and what :func:`measured` gives."""
    for seed in seeds:
        for name, run in (runs or RUNS).items():
            yield {"run": name, "seed": seed, "scenario": run.scenario, **measured(run, seed, **settings)}


def tune(runs: list[str], seed: int = 0, **settings: Any) -> Iterator[dict[str, Any]]:
    """One dict a learning rate, with accuracies on validation rows and another seed than the table's."""
    for name in runs:
        for lr in RATES.get(name, ()):
            found = measured(replace(RUNS[name], lr=lr), seed, on_validation=True, **settings)
            yield {"run": name, "lr": lr, **found}


def write(found: list[dict[str, Any]], path: Path) -> Path:
    """Write the rows as a result."""
    result = TableResult.measured_here(
        "dat",
        experiment="Fashion-MNIST, a small CNN with 33,338 parameters, linf eps 0.1, PGD-5 in training,"
        f" two ranks; 10 epochs in the first table, {Run.epochs} in the others; 12,000 rows, but 1,000 with labels in"
        " the last",
        columns=COLUMNS,
        rows=[
            TableRow(
                NAMES[row["run"]],
                row["seed"],
                SCENARIOS[row["scenario"]],
                {
                    "robust": row["robust_acc"],
                    "clean": row["clean_acc"],
                    "bytes": row["bytes_sent"] / row["bytes_float32"] if "bytes_sent" in row else 1.0,
                },
            )
            for row in found
        ],
    )
    return result.write(path)


def smoke() -> dict[str, Run]:
    """Every run, on few rows and for one epoch."""
    return {
        name: Run(run.scenario, run.optimizer, run.lr, 32, 64, 64 if run.pseudo else 0, 1, run.reduce)
        for name, run in RUNS.items()
    }


def _shown(row: dict[str, Any]) -> str:
    return json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch, one seed: to see that it runs")
    parser.add_argument("--tune", action="store_true", help="print what learning rates do on validation rows")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", default="benchmarks/results/adversarial/dat.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chosen = {name: RUNS[name] for name in arguments.runs}
    if arguments.tune:
        for row in tune(arguments.runs):
            print(_shown(row), flush=True)
        return
    found = []
    for row in rows((1,), smoke(), steps=2, test_rows=20) if arguments.smoke else rows(tuple(arguments.seeds), chosen):
        print(_shown(row), flush=True)
        found.append(row)
    if not arguments.smoke:
        write(found, Path(arguments.output))


if __name__ == "__main__":
    main()
