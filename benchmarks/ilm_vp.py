"""The small experiment of visual prompting with iterative label mapping: a network that knows garments reads digits.

    python -m benchmarks.ilm_vp [--smoke] [--seeds 1 2 3] [--clip FOLDER]

A small CNN that tells ten garments in four rotations apart, 40 classes, is frozen. Digits of 16 pixels in the middle of
a canvas of 28 are its input, and what is around them is learned. The mapping is random, in order, counted once, or
counted in every epoch; beside it stand a linear probe and full fine-tuning of the same network on the same digits. With
``--clip``, the folder that configs/prompting/clip_pretraining.yaml writes, the small CLIP model reads garments that are
turned by 90 degrees, which it has never seen: by its texts as they are, the first or all 81 together, and with a
watermark and a text for every class that is chosen among 81 templates. Writes
benchmarks/results/prompting/ilm_vp.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

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
from lightning_trust.datamodules import FashionMNIST, RotatedFashionMNIST
from lightning_trust.modules import ImageClassifier, VisualPromptClassifier
from lightning_trust.nn import Backbone, LabelMapping, PadPrompt, WatermarkPrompt, create_backbone

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
DIGITS, TURNED = "garments to digits", "CLIP, garments turned by 90 degrees"


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


class Coloured(nn.Module):
    """Grey images as coloured ones, and then a prompt."""

    def __init__(self, prompt: nn.Module) -> None:
        super().__init__()
        self.prompt = prompt

    @property
    def num_bytes(self) -> int:
        """Those of the prompt."""
        return self.prompt.num_bytes  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Grey images to prompted ones."""
        return self.prompt(x.expand(-1, 3, -1, -1))


class Tower(nn.Module):
    """The image tower of a CLIP model and a new last layer."""

    def __init__(self, backbone: Backbone, frozen: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(backbone.spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.spec.std).view(-1, 1, 1))
        self.body = copy.deepcopy(backbone.network.clip.visual).requires_grad_(not frozen)
        self.head = nn.Linear(backbone.network.bank.shape[1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Grey images to logits."""
        return self.head(nn.functional.normalize(self.body((x.expand(-1, 3, -1, -1) - self.mean) / self.std), dim=1))


class Ensemble(nn.Module):
    """CLIP with nothing learned: a class has the mean of its texts' embeddings over all templates."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Grey images to logits."""
        inputs = self.backbone.spec.input_space.from_raw(x.expand(-1, 3, -1, -1))
        return self.backbone.network.zero_shot(inputs)


def clip_rows(seeds: Sequence[int], folder: str, budget: Budget) -> Iterator[dict[str, Any]]:
    """The same for a CLIP model and garments that are turned."""
    names = FashionMNIST.class_names
    for seed in seeds:
        rows = {"train_rows": budget.train_rows or 4000, "val_rows": 0, "test_rows": budget.test_rows or 2000}
        data = RotatedFashionMNIST((90,), seed=seed, **rows)
        backbone = create_backbone(f"open_clip:{folder}", class_names=names)
        mean, std = backbone.spec.mean, backbone.spec.std
        zero = VisualPromptClassifier(
            backbone, Coloured(WatermarkPrompt(CANVAS, 7, mean=mean, std=std)), LabelMapping(810, 10, "identity")
        )
        (found,) = pl.Trainer(**QUIET).test(zero, data, verbose=False)
        yield {"run": "zero-shot, first template", "seed": seed, "accuracy": found["test/acc"], "bytes": 0.0}
        (found,) = pl.Trainer(**QUIET).test(ImageClassifier(Ensemble(backbone), 10), data, verbose=False)
        name = "zero-shot, ensemble of 81 templates"
        yield {"run": name, "seed": seed, "accuracy": found["test/acc"], "bytes": 0.0}
        for name, method in (("first template, watermark", "identity"), ("texts chosen (ILM), watermark", "iterative")):
            pl.seed_everything(seed, verbose=False)
            mapping = LabelMapping(810, 10, method)  # type: ignore[arg-type]
            prompt = Coloured(WatermarkPrompt(CANVAS, 7, mean=mean, std=std))
            host = VisualPromptClassifier(backbone, prompt, mapping, optimizer=partial(torch.optim.Adam, lr=0.03))
            counting = IterativeLabelMapping()
            watch = MappingWatch(counting)
            callbacks = [counting, watch] if mapping.is_counted else []
            row: dict[str, Any] = tested(pl.Trainer(**QUIET, max_epochs=budget.epochs, callbacks=callbacks), host, data)
            if mapping.is_counted:
                row |= {"precision": watch.precision, "first": watch.changed[min(1, budget.epochs - 1)]}
                row["last"] = watch.changed[-1]
            yield {"run": name, "seed": seed, **row}
        for name, frozen in RIVALS.items():
            pl.seed_everything(seed, verbose=False)
            optimizer = partial(torch.optim.Adam, lr=0.01 if frozen else 1e-3)
            tower = ImageClassifier(Tower(backbone, frozen), 10, optimizer=optimizer)
            yield {"run": name, "seed": seed, **tested(pl.Trainer(**QUIET, max_epochs=budget.epochs), tower, data)}


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
        " pixels on a canvas of 28; 1,237 training rows, 360 test rows, 15 epochs of batches of 32; a CLIP model of"
        " 164,864 weights in its image tower, 4,000 training rows, 2,000 test rows, 15 epochs of batches of 128",
        columns=columns,
        rows=[
            TableRow(row["run"], row["seed"], row.get("scenario", DIGITS), {name: row.get(name) for name in columns})
            for row in found
        ],
    )


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one seed: to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", default="runs/prompting/sources", help="where trained source networks lie")
    parser.add_argument("--clip", help="folder of the small CLIP model; without it that table is left out")
    parser.add_argument("--output", default="benchmarks/results/prompting/ilm_vp.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    budget = SMOKE if arguments.smoke else Budget()
    found = []
    seeds = [1] if arguments.smoke else arguments.seeds
    for row in rows_of(seeds, Path(arguments.folder), budget):
        print(json.dumps(row), flush=True)
        found.append(row)
    if arguments.clip is not None:
        for row in clip_rows(seeds, arguments.clip, budget):
            print(json.dumps(row), flush=True)
            found.append({**row, "scenario": TURNED})
    made = result(found)
    if not arguments.smoke:
        made.write(Path(arguments.output))


if __name__ == "__main__":
    main()
