"""The small experiment of fairness reprogramming: a frozen classifier that leans on the ground of its images.

    python -m benchmarks.fairness_reprogram [--smoke] [--seeds 1 2 3]

A small CNN tells garments for the upper body from others. In its training data a red or green ground says the same in
90 % of the images; in the test data it says nothing. A frame around the images, or a patch in a corner, is trained on
5,000 other images, on which the ground is as mixed up as before, and the network stays as it is. Beside it stand the
same rule for all weights (AdvPost, and AdvIn from scratch), thresholds for each group, and both on 500 images.

The second data set is the diabetes study, with its patients' sex as the group and a small MLP as the classifier.

Rows are appended to a file as they come, and rows that are there are not measured again. Writes
benchmarks/results/prompting/fairness_reprogram.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from benchmarks.silent_trainer import SILENT
from benchmarks.stored import now
from benchmarks.table_results import Column, TableResult, TableRow
from lightning_trust.callbacks import AdversarialDebiasing, FairnessEvaluation, FairnessReprogramming
from lightning_trust.core.records import hardware, versions
from lightning_trust.datamodules import BiasedFashionMNIST, Diabetes
from lightning_trust.metrics import DemographicParityGap, EqualizedOddsGap, WorstGroupAccuracy
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import MLP, BorderTrigger, ConcatTrigger, PatchTrigger, SmallCNN

QUIET = SILENT | {"devices": 1, "limit_val_batches": 0}
COLUMNS = {
    "accuracy": Column("Test accuracy"),
    "dp_gap": Column("DP gap", "points"),
    "eo_gap": Column("EO gap", "points"),
    "worst_group": Column("Worst group"),
    "trained": Column("Trained numbers", "number"),
    "seconds": Column("Seconds", "seconds"),
}
LMBDAS = (0.0, 0.1, 1.0, 3.0, 10.0)
GARMENTS, STUDY = "upper body or not, on red and green", "diabetes, by sex"


@dataclass(frozen=True)
class Budget:
    """Sizes of a run."""

    base_rows: int = 12000
    base_epochs: int = 4
    tuning_rows: int = 5000
    few_rows: int = 500
    epochs: int = 10
    test_rows: int | None = None
    study_epochs: int = 40


SMOKE = Budget(200, 1, 100, 50, 1, 200, 2)


@dataclass(frozen=True)
class Task:
    """A data set, a classifier of it, and what is put before it."""

    name: str
    network: Callable[[], nn.Module]
    data: Callable[..., pl.LightningDataModule]
    triggers: dict[str, Callable[[], nn.Module]]
    base: dict[str, Any]
    #: learning rates of a trigger and its adversary, of all weights and theirs, chosen on validation rows
    rates: tuple[float, float, float, float]


def garments(budget: Budget, seed: int) -> Task:
    """Garments on grounds."""
    data = partial(BiasedFashionMNIST, batch_size=64, val_rows=1000, test_rows=budget.test_rows, seed=seed)
    return Task(
        GARMENTS,
        partial(SmallCNN, 3, 2),
        data,
        {"frame": partial(BorderTrigger, 28, 3), "patch": partial(PatchTrigger, 28, 8)},
        {"lr": 0.1, "epochs": budget.base_epochs, "rows": budget.base_rows},
        (0.05, 0.02, 1e-3, 0.01),
    )


def study(budget: Budget, seed: int) -> Task:
    """Patients."""
    return Task(
        STUDY,
        partial(MLP, 10, 2, 1, [16]),
        partial(Diabetes, seed=seed),
        {"mask and offset": partial(ConcatTrigger, 10)},
        {"lr": 0.02, "epochs": budget.study_epochs, "rows": None},
        (0.02, 0.01, 1e-3, 0.01),
    )


def measured(host: ImageClassifier, callback: pl.Callback, data: pl.LightningDataModule) -> dict[str, float]:
    """Accuracy and gaps on test rows, in which the groups are balanced."""
    (found,) = pl.Trainer(**QUIET, callbacks=[callback]).test(host, data, verbose=False)
    names = {"accuracy": "test/acc", "dp_gap": "trust/dp_gap", "eo_gap": "trust/eo_gap"}
    values = {name: float(found[key]) for name, key in names.items()}
    return {**values, "worst_group": float(found["trust/worst_group_acc"])}


def base_model(task: Task, seed: int, folder: Path, callback: pl.Callback | None = None) -> ImageClassifier:
    """The classifier trained on its own part of the data; the same file is read the next time where it is plain."""
    path = folder / f"{task.network.func.__name__}-{task.base['rows']}-{task.base['epochs']}-{seed}.pt"  # type: ignore[attr-defined]
    pl.seed_everything(seed, verbose=False)
    host = classifier(task.network(), partial(torch.optim.SGD, lr=task.base["lr"], momentum=0.9, weight_decay=5e-4))
    if callback is None and path.is_file():
        host.load_state_dict(torch.load(path, weights_only=True))
        return host
    data = task.data(part="base", train_rows=task.base["rows"])
    attached = [callback or FairnessEvaluation()]
    pl.Trainer(**QUIET, max_epochs=task.base["epochs"], callbacks=attached).fit(host, data)
    if callback is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(host.state_dict(), path)
    return host


def classifier(network: nn.Module, optimizer: Callable[..., Any]) -> ImageClassifier:
    """A host of two classes."""
    return ImageClassifier(network, 2, 3, optimizer=optimizer)


def tuned(
    task: Task, seed: int, folder: Path, callback: pl.Callback, rows: int | None, epochs: int, optimizer: Any = None
) -> dict[str, float]:
    """Train what a callback trains of the base model on tuning rows."""
    network = base_model(task, seed, folder).network
    pl.seed_everything(seed, verbose=False)
    host = classifier(network, optimizer or partial(torch.optim.SGD, lr=0.1))
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, callbacks=[callback])
    start = time.perf_counter()
    trainer.fit(host, task.data(part="tuning", train_rows=rows))
    seconds = time.perf_counter() - start
    part = callback.part if isinstance(callback, FairnessReprogramming) else host
    count = sum(parameter.numel() for parameter in part.parameters())
    return {**measured(host, callback, task.data(train_rows=1)), "trained": float(count), "seconds": seconds}


def reprogrammed(task: Task, trigger: str, criterion: Any, lmbda: float, seed: int) -> FairnessReprogramming:
    """The callback; the trigger is drawn with the seed."""
    pl.seed_everything(seed, verbose=False)
    return FairnessReprogramming(
        task.triggers[trigger](),
        criterion,
        lmbda,
        hidden=[64],
        optimizer=partial(torch.optim.Adam, lr=task.rates[0]),
        schedule="cosine",
        adversary_lr=task.rates[1],
    )


def debiasing(task: Task, lmbda: float) -> AdversarialDebiasing:
    """The same rule for all weights."""
    return AdversarialDebiasing("eo", lmbda, hidden=[64], adversary_lr=task.rates[3])


def thresholds(task: Task, seed: int, folder: Path, rows: int | None) -> dict[str, float] | None:
    """fairlearn's thresholds for each group, found on tuning rows; None where fairlearn is not installed."""
    try:
        from fairlearn.postprocessing import ThresholdOptimizer
    except ImportError:
        return None
    from sklearn.base import BaseEstimator

    class Known(BaseEstimator):  # type: ignore[misc]
        """A classifier whose input is its output."""

        fitted_ = True

        def fit(self, *_: Any) -> Any:
            return self

        def predict(self, x: Any) -> Any:
            return x[:, 0]

    network = base_model(task, seed, folder).network.eval()
    data = task.data(part="tuning", train_rows=rows)
    data.prepare_data()
    data.setup("fit")
    start = time.perf_counter()
    x, y, z = (torch.cat(part) for part in zip(*data.train_dataloader(), strict=True))
    optimizer = ThresholdOptimizer(
        estimator=Known(), constraints="equalized_odds", prefit=True, predict_method="predict"
    )
    optimizer.fit(scores(network, x), y.numpy(), sensitive_features=z.numpy())
    seconds = time.perf_counter() - start
    x, y, z = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    labels = optimizer.predict(scores(network, x), sensitive_features=z.numpy(), random_state=seed)
    labels = torch.as_tensor(labels).long()
    values = {"accuracy": float((labels == y).float().mean()), "trained": 4.0, "seconds": seconds}
    kinds = {"dp_gap": DemographicParityGap, "eo_gap": EqualizedOddsGap, "worst_group": WorstGroupAccuracy}
    for name, kind in kinds.items():
        metric = kind()
        metric.update(labels, y, z)
        values[name] = float(metric.compute())
    return values


@torch.no_grad()
def scores(network: nn.Module, inputs: torch.Tensor) -> Any:
    """Probability of class 1, shape ``(N, 1)``."""
    return torch.cat([network(part).softmax(dim=1)[:, 1:] for part in inputs.split(512)]).double().numpy()


def runs(task: Task, seed: int, folder: Path, budget: Budget) -> dict[str, Callable[[], dict[str, float] | None]]:
    """What is measured, by name."""
    few, many = budget.few_rows, budget.tuning_rows
    epochs, rows = (budget.epochs, many) if task.name == GARMENTS else (budget.study_epochs, None)
    adam = partial(torch.optim.Adam, lr=task.rates[2])

    def base() -> dict[str, float]:
        host = base_model(task, seed, folder)
        count = sum(parameter.numel() for parameter in host.parameters())
        return {
            **measured(host, FairnessEvaluation(), task.data(train_rows=1)),
            "trained": float(count),
            "seconds": None,
        }

    def from_scratch(lmbda: float) -> dict[str, float]:
        start = time.perf_counter()
        callback = debiasing(task, lmbda)
        host = base_model(task, seed, folder, callback)
        seconds = time.perf_counter() - start
        count = sum(parameter.numel() for parameter in host.parameters())
        return {**measured(host, callback, task.data(train_rows=1)), "trained": float(count), "seconds": seconds}

    def one(trigger: str, criterion: str, lmbda: float, count: int | None, passes: int) -> dict[str, float]:
        return tuned(task, seed, folder, reprogrammed(task, trigger, criterion, lmbda, seed), count, passes)

    found: dict[str, Callable[[], dict[str, float] | None]] = {"base (ERM)": base}
    first = next(iter(task.triggers))
    for criterion in ("eo", "dp"):
        for lmbda in LMBDAS:
            if criterion == "eo" or lmbda == 1.0:
                words = f"{first}, {criterion.upper()}, lmbda {lmbda:g}" if lmbda else f"{first}, lmbda 0"
                found[words] = partial(one, first, criterion, lmbda, rows, epochs)
    for trigger in list(task.triggers)[1:]:
        found[f"{trigger}, EO, lmbda 1"] = partial(one, trigger, "eo", 1.0, rows, epochs)
    for lmbda in (0.0, 1.0):
        words = f"AdvPost, EO, lmbda {lmbda:g}" if lmbda else "fine-tuning (AdvPost, lmbda 0)"
        found[words] = lambda lmbda=lmbda: tuned(task, seed, folder, debiasing(task, lmbda), rows, epochs, adam)  # type: ignore[misc]
    found["AdvIn, EO, lmbda 1"] = partial(from_scratch, 1.0)
    found["thresholds by group, which must be known"] = partial(thresholds, task, seed, folder, rows)
    if task.name == GARMENTS:
        # as many steps as with all rows
        passes = max(1, budget.epochs * many // few)
        found[f"{first}, EO, lmbda 1, {few} images"] = partial(one, first, "eo", 1.0, few, passes)
        found[f"AdvPost, EO, lmbda 1, {few} images"] = lambda: tuned(
            task, seed, folder, debiasing(task, 1.0), few, passes, adam
        )
    return found


def rows_of(seeds: Sequence[int], folder: Path, budget: Budget, known: Sequence[Any] = ()) -> Iterator[dict[str, Any]]:
    """One dict a run and seed that is not known yet."""
    seen = {(row["scenario"], row["run"], row["seed"]) for row in known}
    for make in (garments, study):
        for seed in seeds:
            task = make(budget, seed)
            for name, run in runs(task, seed, folder, budget).items():
                if (task.name, name, seed) not in seen:
                    values = run()
                    if values is not None:
                        yield {"scenario": task.name, "run": name, "seed": seed, **values}


def result(found: Sequence[dict[str, Any]], budget: Budget) -> TableResult:
    """The rows as a result, in the order of the runs."""
    tasks = [make(budget, 1) for make in (garments, study)]
    order = [(task.name, run) for task in tasks for run in runs(task, 1, Path(), budget)]
    rows = sorted(found, key=lambda row: (order.index((row["scenario"], row["run"])), row["seed"]))
    return TableResult(
        method="fairness-reprogram",
        experiment="Garments of Fashion-MNIST on red and green grounds, which agree with the class in 90 % of 12,000"
        " training and 5,000 tuning images and in half of 10,000 test images; a CNN of 33,106 weights; 10 epochs in"
        " batches of 64. Diabetes: 160 training, 102 tuning and 120 test patients, an MLP of 210 weights, 40 epochs in"
        " batches of 32. Gaps in points",
        config="configs/prompting/fairness_reprogram.yaml",
        hardware=hardware(),
        versions=versions(),
        created=now(),
        seeds=sorted({row["seed"] for row in rows}),
        rows=[
            TableRow(row["run"], row["seed"], row["scenario"], {name: row.get(name) for name in COLUMNS})
            for row in rows
        ],
        columns=COLUMNS,
    )


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one seed: to see that it runs; writes nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", default="runs/prompting/fairness", help="where base models and rows lie")
    parser.add_argument("--output", default="benchmarks/results/prompting/fairness_reprogram.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = Path(arguments.folder)
    if arguments.smoke:
        for row in rows_of([1], folder / "smoke", SMOKE):
            print(json.dumps(row), flush=True)
        return
    kept = folder / "rows.jsonl"
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        for row in rows_of(arguments.seeds, folder, Budget(), known):
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
            known.append(row)
    print(result(known, Budget()).write(Path(arguments.output)))


if __name__ == "__main__":
    main()
