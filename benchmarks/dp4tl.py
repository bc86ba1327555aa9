"""The small experiment of DP4TL: which classes of a source are worth pretraining on for a target.

    python -m benchmarks.dp4tl [--smoke] [--seeds 1 2 3]

The source has 30 classes: ten garments in three rotations, none of them upright. The target tells five upright
upper-body garments apart, from 500 images that the source does not have. A small surrogate is trained on the source for
two epochs; what is chosen with it pretrains a larger network, for as many epochs whatever is kept, which is then
finetuned on the target: its last layer, and all of it. Rows are appended to a file as they come, so that a run that was
killed goes on.
Seconds are those of the process on one thread, so that other processes do not count.

Writes benchmarks/results/prompting/dp4tl.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
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
from lightning_trust.core.records import hardware, versions
from lightning_trust.datamodules import (
    ClassMeanPruner,
    FashionMNISTSubset,
    FeatureMappingPruner,
    GradNormPruner,
    LabelMappingPruner,
    ModeratePruner,
    PrunedDataModule,
    PruneResult,
    RandomClassPruner,
    RotatedFashionMNIST,
    SourcePruner,
)
from lightning_trust.modules import ImageClassifier, TransferClassifier

ROTATIONS, UPPER_BODY = (90, 180, 270), (0, 2, 3, 4, 6)
CLASSES = 10 * len(ROTATIONS)
SURROGATE, LARGE = (16, 32), (16, 32, 32, 64)
RATIOS = (0.6, 0.4, 0.2)
QUIET = SILENT | {"devices": 1, "limit_val_batches": 0}


@dataclass(frozen=True)
class Budget:
    """How long everything goes on; smaller to see that it runs."""

    source_rows: int = 18_000
    target_rows: int = 500
    test_rows: int = 2_500
    surrogate_epochs: int = 2
    epochs: int = 4
    probe_epochs: int = 50
    finetune_epochs: int = 30


SMOKE = Budget(600, 60, 60, 1, 1, 1, 1)


@dataclass
class Task:
    """Source, target and what chooses for one seed."""

    source: RotatedFashionMNIST
    target: FashionMNISTSubset
    surrogate: nn.Module
    early: nn.Module


def pruner(name: str, ratio: float, seed: int) -> SourcePruner:
    """What a run of a table chooses with."""
    if name == "random classes":
        return RandomClassPruner(ratio, seed=seed)
    makers: dict[str, type[SourcePruner] | partial[SourcePruner]] = {
        "label mapping": partial(LabelMappingPruner, CLASSES),
        "label mapping, reversed": partial(LabelMappingPruner, CLASSES, reverse=True),
        "feature mapping": FeatureMappingPruner,
        "class means, with the target's labels": ClassMeanPruner,
        "Moderate": ModeratePruner,
        "GraNd, one network": GradNormPruner,
    }
    return makers[name](keep_ratio=ratio)


#: run -> shares that are kept
RUNS: dict[str, tuple[float, ...]] = {
    "no pretraining": (0.0,),
    "whole source": (1.0,),
    "label mapping": RATIOS,
    "feature mapping": RATIOS,
    "random classes": RATIOS,
    "label mapping, reversed": RATIOS,
    "class means, with the target's labels": (0.4,),
    "Moderate": (0.4,),
    "GraNd, one network": (0.4,),
}


def trained(widths: Sequence[int], data: pl.LightningDataModule, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """A network trained on source data, and the seconds that took."""
    pl.seed_everything(seed, verbose=False)
    host = ImageClassifier("SmallCNN", CLASSES, network_args={"widths": list(widths)})
    start = time.process_time()
    pl.Trainer(**QUIET, max_epochs=epochs).fit(host, data)
    return host.network, time.process_time() - start


def task(seed: int, budget: Budget) -> Task:
    """The data of a seed, a surrogate, and a network early in training."""
    val = 2_000 if budget.source_rows > 2_000 else 0
    source = RotatedFashionMNIST(ROTATIONS, train_rows=budget.source_rows, val_rows=val, seed=seed)
    target = FashionMNISTSubset(
        UPPER_BODY,
        skip_rows=budget.source_rows + val,
        train_rows=budget.target_rows,
        val_rows=0,
        test_rows=budget.test_rows,
        seed=seed,
    )
    for data in (source, target):
        data.setup()
    surrogate, _ = trained(SURROGATE, source, budget.surrogate_epochs, 100 + seed)
    early, _ = trained(SURROGATE, source, 1, 200 + seed)
    return Task(source, target, surrogate, early)


def finetuned(network: nn.Module, target: pl.LightningDataModule, seed: int, mode: Any, budget: Budget) -> float:
    """Test accuracy in [0, 1] of a linear probe (``lp``) or of full finetuning (``ff``)."""
    pl.seed_everything(seed, verbose=False)
    epochs, rate = (budget.probe_epochs, 0.01) if mode == "lp" else (budget.finetune_epochs, 1e-3)
    host = TransferClassifier(
        copy.deepcopy(network), mode=mode, num_classes=len(UPPER_BODY), optimizer=partial(torch.optim.Adam, lr=rate)
    )
    trainer = pl.Trainer(**QUIET, max_epochs=epochs)
    trainer.fit(host, target)
    return trainer.test(host, target, verbose=False)[0]["test/acc"]


def upper_body_share(result: PruneResult, labels: torch.Tensor) -> float:
    """Share of upper-body garments among the kept rows."""
    garments = labels[result.kept_indices] % 10
    return torch.isin(garments, torch.tensor(UPPER_BODY)).double().mean().item()


def measured(run: str, ratio: float, seed: int, chosen_with: Task, budget: Budget) -> dict[str, Any]:
    """One row: choose, pretrain, finetune both ways."""
    data: pl.LightningDataModule = chosen_with.source
    found: dict[str, Any] = {"run": run, "seed": seed, "ratio": ratio, "share": ratio}
    if 0.0 < ratio < 1.0:
        start = time.process_time()
        early = run.startswith("GraNd")
        result = pruner(run, ratio, seed).fit(
            chosen_with.early if early else chosen_with.surrogate,
            chosen_with.source.train_dataset,
            chosen_with.target.train_dataloader(),
        )
        found["selection"] = time.process_time() - start
        found["share"] = result.kept_share
        found["upper"] = upper_body_share(result, chosen_with.source.train_dataset.targets)
        if result.unit == "class":
            found["kept"] = result.kept_classes.tolist()
            found["zero"] = result.zero_scores_kept
            print(f"{run}, {ratio:.0%}: {', '.join(chosen_with.source.class_names[each] for each in found['kept'])}")
        data = PrunedDataModule(data, result)
    network, found["seconds"] = trained(LARGE, data, budget.epochs if ratio else 0, seed)
    found["lp"] = finetuned(network, chosen_with.target, seed, "lp", budget) if ratio else None
    found["ff"] = finetuned(network, chosen_with.target, seed, "ff", budget)
    return found


def rows_of(seeds: Sequence[int], budget: Budget, done: Sequence[dict[str, Any]] = ()) -> Iterator[dict[str, Any]]:
    """One dict a run, share and seed; those that are done already are left out."""
    have = {(row["run"], row["ratio"], row["seed"]) for row in done}
    for seed in seeds:
        wanted = [(run, ratio) for run, ratios in RUNS.items() for ratio in ratios if (run, ratio, seed) not in have]
        if wanted:
            chosen_with = task(seed, budget)
            for run, ratio in wanted:
                yield measured(run, ratio, seed, chosen_with, budget)


def overlap(row: dict[str, Any], found: Sequence[dict[str, Any]]) -> float | None:
    """Mean Jaccard index of the kept classes with those that surrogates of the other seeds keep."""
    if row["run"] not in ("label mapping", "feature mapping"):
        return None
    kept = set(row["kept"])
    others = [
        len(kept & set(other["kept"])) / len(kept | set(other["kept"]))
        for other in found
        if (other["run"], other["ratio"]) == (row["run"], row["ratio"]) and other["seed"] != row["seed"]
    ]
    return sum(others) / len(others) if others else None


def result(found: Sequence[dict[str, Any]]) -> TableResult:
    """The rows as a result."""
    columns = {
        "lp": Column("Linear probe"),
        "ff": Column("Full finetuning"),
        "share": Column("Source rows kept"),
        "time": Column("Pretraining time, of the whole source's", "ratio"),
        "upper": Column("Upper-body garments among them"),
        "zero": Column("Kept classes with score 0", "number"),
        "overlap": Column("Overlap with other surrogates' choice"),
        "selection": Column("Choice, seconds", "seconds"),
    }
    whole = {row["seed"]: row["seconds"] for row in found if row["run"] == "whole source"}
    # what is not pretrained, all, and then by what is kept
    rows = sorted(found, key=lambda row: (row["ratio"] > 0.0, -row["ratio"], list(RUNS).index(row["run"]), row["seed"]))
    return TableResult(
        method="dp4tl",
        config="configs/prompting/dp4tl.yaml",
        hardware=hardware(),
        versions=versions(),
        created=now(),
        seeds=sorted({row["seed"] for row in rows}),
        experiment="source: Fashion-MNIST turned by 90, 180 and 270 degrees, 30 classes, 18,000 rows; target: five"
        " upright upper-body garments, 500 rows, test accuracy on 2,500; surrogate: two convolutions, two epochs;"
        " pretrained: four convolutions, four epochs whatever is kept",
        columns=columns,
        rows=[
            TableRow(
                row["run"] if row["ratio"] in (0.0, 1.0) else f"{100 * row['ratio']:.0f} %: {row['run']}",
                row["seed"],
                "upright upper-body garments",
                {
                    **{name: row.get(name) for name in columns},
                    "time": row["seconds"] / whole[row["seed"]] if row["ratio"] and row["seed"] in whole else None,
                    # a draw has no scores
                    "zero": None if row["run"] == "random classes" else row.get("zero"),
                    "overlap": overlap(row, rows),
                },
            )
            for row in rows
        ],
    )


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one seed: to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", default="runs/prompting/dp4tl.jsonl", help="where rows are appended as they come")
    parser.add_argument("--output", default="benchmarks/results/prompting/dp4tl.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.smoke:
        result([row for row in rows_of([1], SMOKE) if print(json.dumps(row)) is None])
        return
    path = Path(arguments.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for row in rows_of(arguments.seeds, Budget(), done):
        print(json.dumps(row), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        done.append(row)
    result(done).write(Path(arguments.output))


if __name__ == "__main__":
    main()
