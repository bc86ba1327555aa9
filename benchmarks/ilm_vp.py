"""The small experiment of visual prompting with iterative label mapping: a network that knows garments reads digits.

    python -m benchmarks.ilm_vp [--smoke] [--seeds 1 2 3]

A small CNN that tells ten garments in four rotations apart, 40 classes, is frozen. Digits of 16 pixels in the middle of
a canvas of 28 are its input, and what is around them is learned. The mapping is random, in order, counted once, or
counted in every epoch; beside it stand a linear probe and full fine-tuning of the same network on the same digits.
Writes benchmarks/results/prompting/ilm_vp.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.prompting_tasks import (
    CANVAS,
    IMAGE,
    QUIET,
    SMOKE,
    Budget,
    MappingWatch,
    digits,
    rival,
    source_network,
    tested,
)
from benchmarks.table_results import Column, TableResult, TableRow
from lightning_trust.callbacks import IterativeLabelMapping
from lightning_trust.modules import VisualPromptClassifier
from lightning_trust.nn import LabelMapping, PadPrompt

#: name in the table -> method of the mapping, and whether a prompt is trained
MAPPINGS: dict[str, tuple[str, bool]] = {
    "random mapping (RLM)": ("random", True),
    "mapping in order": ("identity", True),
    "counted once, no prompt trained": ("frequency", False),
    "counted once (FLM)": ("frequency", True),
    "counted every epoch (ILM)": ("iterative", True),
}
RIVALS = {"linear probe": True, "full fine-tuning": False}
LR = 0.1


def prompted(network: torch.nn.Module, method: str, trained: bool, seed: int, budget: Budget) -> dict[str, Any]:
    """Train a prompt: test accuracy, bytes, seconds, and what became of the mapping."""
    pl.seed_everything(seed, verbose=False)
    mapping = LabelMapping(40, 10, method, seed=seed)  # type: ignore[arg-type]
    host = VisualPromptClassifier(
        network,
        PadPrompt(IMAGE, CANVAS, channels=1),
        mapping,
        optimizer=partial(torch.optim.Adam, lr=LR if trained else 0.0),
    )
    counting = IterativeLabelMapping()
    watch = MappingWatch(counting)
    callbacks = [counting, watch] if mapping.is_counted else []
    epochs = budget.epochs if trained else 1
    found: dict[str, Any] = tested(pl.Trainer(**QUIET, max_epochs=epochs, callbacks=callbacks), host, digits(budget))
    if not trained:
        found["bytes"] = 0.0
    if mapping.is_counted:
        found["precision"] = watch.precision
    if method == "iterative":
        found |= {"first": watch.changed[min(1, epochs - 1)], "last": watch.changed[-1]}
    return found


def rows_of(seeds: Sequence[int], folder: Path, budget: Budget) -> Iterator[dict[str, Any]]:
    """One dict a run and seed."""
    for seed in seeds:
        for name, (method, trained) in MAPPINGS.items():
            network = source_network(seed, folder, budget)
            yield {"run": name, "seed": seed, **prompted(network, method, trained, seed, budget)}
        for name, frozen in RIVALS.items():
            yield {"run": name, "seed": seed, **rival(source_network(seed, folder, budget), frozen, seed, budget)}


def result(found: Sequence[dict[str, Any]]) -> TableResult:
    """The rows as a result."""
    columns = {
        "accuracy": Column("Test accuracy"),
        "precision": Column("Mapping still that of the final prompt"),
        "first": Column("Mapping changed in the second epoch"),
        "last": Column("... in the last"),
        "bytes": Column("Trained, bytes", "number"),
        "seconds": Column("Seconds", "seconds"),
    }
    return TableResult.measured_here(
        "ilm-vp",
        experiment="a CNN of 35,288 weights that tells ten garments in four rotations apart, frozen, reads digits of 16"
        " pixels on a canvas of 28; 1,237 training rows, 360 test rows, 15 epochs of batches of 32",
        columns=columns,
        rows=[
            TableRow(row["run"], row["seed"], "garments to digits", {name: row.get(name) for name in columns})
            for row in found
        ],
    )


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one seed: to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", default="runs/prompting/sources", help="where trained source networks lie")
    parser.add_argument("--output", default="benchmarks/results/prompting/ilm_vp.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    budget = SMOKE if arguments.smoke else Budget()
    found = []
    for row in rows_of([1] if arguments.smoke else arguments.seeds, Path(arguments.folder), budget):
        print(json.dumps(row), flush=True)
        found.append(row)
    made = result(found)
    if not arguments.smoke:
        made.write(Path(arguments.output))


if __name__ == "__main__":
    main()
