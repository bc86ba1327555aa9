"""The small experiment of saliency guided adversarial training: a planted shortcut that is gone at a new site.

    python -m benchmarks.shortcut

Fashion-MNIST with a faint pattern that tells the class in training and at home, and nothing at the new site. Plain
training, masking of random and of least salient features, adversarial training, and both together; once with a pattern
weaker than the radius of the attack, once with a stronger one, which the attack cannot remove. Writes
benchmarks/results/adversarial/saliency_guided_adversarial_training.json.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.silent_trainer import SILENT
from benchmarks.table_results import Column, TableResult, TableRow
from lightning_trust.attacks import PGD
from lightning_trust.callbacks import OODEvaluation, SaliencyGuidedAdversarialTraining
from lightning_trust.datamodules import ShortcutFashionMNIST
from lightning_trust.metrics import SaliencyMass
from lightning_trust.modules import ImageClassifier

EPS = 0.1
RUNS: dict[str, dict[str, Any] | None] = {
    "ERM": None,
    "random mask": {"saliency": "random"},
    "SGT (mask alone)": {},
    "AT (attack alone)": {"attack": True, "mask_fraction": 0.0},
    "SGA (both)": {"attack": True},
}
COLUMNS = {
    "away": Column("Accuracy at the new site"),
    "home": Column("At home"),
    "gap": Column("Lost on the way", "points"),
    "mass": Column("Saliency on the garment, new site"),
    "seconds": Column("Training", "seconds"),
}
#: a pixel of the clean image above this is one of the garment: the smallest grey value that is not black
GARMENT = 0.5 / 255
AMPLITUDES = {"pattern of 0.08, weaker than eps": 0.08, "pattern of 0.5, stronger than eps": 0.5}


def run(name: str, amplitude: float, seed: int, rows: int = 8000, epochs: int = 4, test_rows: int = 2000) -> TableRow:
    """Train one network and measure it at home and at the new site."""
    pl.seed_everything(seed, verbose=False)
    shared: dict[str, Any] = {"train_rows": rows, "val_rows": 100, "test_rows": test_rows, "amplitude": amplitude}
    data = ShortcutFashionMNIST(seed=seed, noise=0.05, **shared)
    away = ShortcutFashionMNIST(seed=seed, noise=0.05, shifted=True, **shared)
    arguments = RUNS[name]
    callbacks: list[pl.Callback] = [OODEvaluation({"new site": away})]
    if arguments is not None:
        chosen = dict(arguments)
        attack = PGD(eps=EPS, step_size=0.04, steps=5) if chosen.pop("attack", False) else None
        callbacks.insert(0, SaliencyGuidedAdversarialTraining(attack, **chosen))
    trainer = pl.Trainer(
        **SILENT,
        max_epochs=epochs,
        callbacks=callbacks,
        limit_val_batches=0,
    )
    host = ImageClassifier("SmallCNN")
    start = time.perf_counter()
    trainer.fit(host, data)
    seconds = time.perf_counter() - start
    (found,) = trainer.test(host, data, verbose=False)
    scenario = next(words for words, value in AMPLITUDES.items() if value == amplitude)
    home, elsewhere = float(found["trust/id_acc"]), float(found["trust/ood_acc/new site"])
    garment = ShortcutFashionMNIST(seed=seed, noise=0.0, **{**shared, "amplitude": 0.0})
    mass = saliency_on_the_garment(host, away, garment)
    values = {"home": home, "away": elsewhere, "gap": home - elsewhere, "mass": mass, "seconds": seconds}
    return TableRow(name, seed, scenario, values)


def saliency_on_the_garment(host: ImageClassifier, site: ShortcutFashionMNIST, clean: ShortcutFashionMNIST) -> float:
    """Share of the saliency of a site's test images on what is not background in the same images without a pattern."""
    clean.prepare_data()
    clean.setup("test")
    regions = clean.test_dataset.images[:, 0].float() / 255.0 > GARMENT
    metric = SaliencyMass()
    device = host.device
    for place, (inputs, targets) in enumerate(site.test_dataloader()):
        rows = regions[place * site.batch_size :][: len(inputs)]
        metric.update(host.network, inputs.to(device), targets.to(device), rows.to(device))
    return float(metric.compute())


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--output", default="benchmarks/results/adversarial/saliency_guided_adversarial_training.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = []
    for amplitude in AMPLITUDES.values():
        for seed in arguments.seeds:
            for name in RUNS:
                row = run(name, amplitude, seed, arguments.rows, arguments.epochs, arguments.test_rows)
                print(f"  {row.scenario}, seed {seed}, {name}: {dict(row.values)}", flush=True)
                found.append(row)
    TableResult.measured_here(
        "saliency-guided-adversarial-training",
        experiment=f"Fashion-MNIST with a planted shortcut, {arguments.rows:,} rows, a small CNN with 33,338"
        f" parameters, {arguments.epochs} epochs, PGD-5 of linf eps {EPS}",
        columns=COLUMNS,
        rows=found,
    ).write(Path(arguments.output))


if __name__ == "__main__":
    main()
