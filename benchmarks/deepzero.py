"""Accuracy against forward passes: the digits, trained without back-propagation in ten ways, and with it in two.

    python -m benchmarks.deepzero [--smoke | --tune | --merge] [--seeds 1 2 3] [--runs ...]

An MLP of 1,210 parameters, batch 256, SGD with momentum 0.9 (0 for single random directions) at a constant rate, the
callback ``ZerothOrderGradient`` in an ordinary Trainer. A pass of the batch is one query; a step of back-propagation
counts as three. Learning rates stand in :data:`RUNS`, each the best of a few on validation rows with another seed
and a third of the steps, which ``--tune`` prints; sparse coordinates that change have the rate of all coordinates.
Back-propagation of the network that GraSP pruned starts with the scores of 25 rows of each class, two backward passes
that are not counted. Writes benchmarks/results/zeroth_order/deepzero.json; ``--merge`` keeps the runs that it holds
and adds others.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

torch.set_num_threads(1)

import lightning.pytorch as pl  # noqa: E402

from benchmarks.curve_results import Curve, CurveResult  # noqa: E402
from benchmarks.silent_trainer import SILENT  # noqa: E402
from lightning_trust.callbacks import DynamicSparseGradient, OneShotPruning, ZerothOrderGradient  # noqa: E402
from lightning_trust.core.host import named_parameters  # noqa: E402
from lightning_trust.core.masks import select_parameters  # noqa: E402
from lightning_trust.datamodules import Digits  # noqa: E402
from lightning_trust.functional.zeroth_order import grasp_scores  # noqa: E402
from lightning_trust.modules import ImageClassifier  # noqa: E402
from lightning_trust.optim import CGE, RGE, ForwardGradient, MeZO, PatternSearch  # noqa: E402

D = 1210
QUIET = SILENT | {"devices": 1, "limit_val_batches": 0}


@dataclass(frozen=True)
class Run:
    """One way of training.

    Attributes:
        lr: Learning rate.
        callbacks: Makes what is added to the Trainer.
        steps: How many steps it takes.
        momentum: Momentum of SGD.
        optimizer: An optimizer that asks for losses itself, or None for SGD.

    """

    lr: float
    callbacks: Callable[[], list[pl.Callback]]
    steps: int = 150
    momentum: float = 0.9
    optimizer: type[torch.optim.Optimizer] | None = None


class GraSP(OneShotPruning):
    """Zeros the weights whose removal harms the flow of the gradient least, by autograd at the initial weights."""

    def __init__(self, sparsity: float, keep: str, samples_per_class: int = 25) -> None:
        super().__init__(sparsity)
        self.keep = keep
        self.samples_per_class = samples_per_class

    def scores(self, host):
        """Scores of which the lowest go."""
        known = named_parameters(host)
        weights = {name: known[name] for name in select_parameters(host, self._patterns(host), self.exclude)}
        dataset = host.trainer.datamodule.train_dataset
        images, labels = zip(*(dataset[place] for place in range(len(dataset))), strict=True)
        labels = torch.tensor(labels)
        rows = torch.cat([(labels == each).nonzero().flatten()[: self.samples_per_class] for each in labels.unique()])
        with torch.enable_grad():
            scores = grasp_scores(F.cross_entropy(host(torch.stack(images)[rows]), labels[rows]), weights)
        return {name: score.abs() if self.keep == "abs" else -score for name, score in scores.items()}


def _sparse(ratios: str, every: int | None = 1) -> list[pl.Callback]:
    return [
        DynamicSparseGradient(0.9, ratios, redraw_every_n_epochs=None, redraw_every_n_steps=every),  # type: ignore[arg-type]
        ZerothOrderGradient(CGE(mu=5e-3)),
    ]


RUNS: dict[str, Run] = {
    "back-propagation": Run(0.1, list),
    "back-propagation, 90 % pruned by GraSP": Run(0.1, lambda: [GraSP(0.9, "signed")], steps=600),
    "CGE": Run(0.1, lambda: [ZerothOrderGradient(CGE(mu=5e-3))]),
    "CGE, 90 % sparse, ZO-GraSP": Run(0.1, lambda: _sparse("zo_grasp"), steps=600),
    "CGE, 90 % sparse, uniform": Run(0.1, lambda: _sparse("uniform"), steps=600),
    "CGE, 90 % sparse, ZO-GraSP, same mask": Run(0.3, lambda: _sparse("zo_grasp", every=None), steps=600),
    "RGE, q = d": Run(0.2, lambda: [ZerothOrderGradient(RGE(q=D, mu=1e-3))]),
    "RGE, q = d / 10": Run(0.1, lambda: [ZerothOrderGradient(RGE(q=D // 10, mu=1e-3))], steps=600),
    "MeZO": Run(0.016, lambda: [ZerothOrderGradient(clean_forward=False)], steps=12000, optimizer=MeZO),
    "forward gradient": Run(0.016, lambda: [ZerothOrderGradient(ForwardGradient(q=1))], steps=12000, momentum=0.0),
    "pattern search": Run(0.1, lambda: [ZerothOrderGradient()], steps=150, optimizer=PatternSearch),
}
#: learning rates that are tried on validation rows
RATES: dict[str, tuple[float, ...]] = {
    "back-propagation": (0.03, 0.1, 0.3),
    "back-propagation, 90 % pruned by GraSP": (0.03, 0.1, 0.3, 1.0),
    "CGE": (0.03, 0.1, 0.3),
    "CGE, 90 % sparse, ZO-GraSP, same mask": (0.03, 0.1, 0.3, 1.0),
    "RGE, q = d": (0.05, 0.1, 0.2, 0.4),
    "RGE, q = d / 10": (0.01, 0.02, 0.05, 0.1, 0.2),
    "MeZO": (0.004, 0.008, 0.016, 0.03, 0.06),
    "forward gradient": (0.004, 0.008, 0.016, 0.03),
    "pattern search": (0.003, 0.01, 0.03, 0.1, 0.3),
}


class Measure(pl.Callback):
    """Accuracy on held-out rows after some steps, ever farther apart."""

    def __init__(self, rows: str, every: float = 1.15) -> None:
        self.rows = rows
        self.every = every
        self.points: list[tuple[float, float]] = []
        self.seconds = 0.0
        self._next = 1.0
        self._start = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds += time.perf_counter() - self._start
        step = trainer.global_step
        if step < self._next and step < trainer.max_steps:
            return
        self._next = max(step + 1.0, step * self.every)
        source = next((each for each in trainer.callbacks if isinstance(each, ZerothOrderGradient)), None)
        forwards = 3.0 * step if source is None else float(source.queries)
        dataset = getattr(trainer.datamodule, f"{self.rows}_dataset")
        images, labels = zip(*(dataset[place] for place in range(len(dataset))), strict=True)
        with torch.no_grad():
            logits = pl_module(torch.stack(images))
        accuracy = (logits.argmax(dim=1) == torch.tensor(labels)).double().mean()
        self.points.append((forwards, float(accuracy)))


def curve(name: str, seed: int, lr: float | None = None, steps: int | None = None, rows: str = "test") -> Curve:
    """Train once and measure along the way."""
    run = RUNS[name]
    lr, steps = run.lr if lr is None else lr, run.steps if steps is None else steps
    pl.seed_everything(seed, verbose=False)
    optimizer: Any = partial(torch.optim.SGD, lr=lr, momentum=run.momentum)
    if run.optimizer is not None:
        optimizer = partial(run.optimizer, lr=lr)
    classifier = ImageClassifier("MLP", network_args={"image_size": 8}, optimizer=optimizer, schedule="constant")
    measure = Measure(rows)
    trainer = pl.Trainer(**QUIET, max_steps=steps, callbacks=[*run.callbacks(), measure])
    trainer.fit(classifier, datamodule=Digits(batch_size=256, seed=0))
    queries, accuracies = zip(*measure.points, strict=True)
    return Curve(name, seed, list(queries), list(accuracies), queries[-1] / trainer.global_step, measure.seconds)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of each run: to see that it works")
    parser.add_argument("--tune", action="store_true", help="print what learning rates do on validation rows")
    parser.add_argument("--merge", action="store_true", help="keep the runs that the file holds, but those run now")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", default="benchmarks/results/zeroth_order/deepzero.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.tune:
        for name in arguments.runs:
            for lr in RATES.get(name, ()):
                found = curve(name, seed=0, lr=lr, steps=RUNS[name].steps // 3, rows="val")
                print(json.dumps({"run": name, "lr": lr, "accuracy": round(found.accuracy[-1], 4)}), flush=True)
        return
    curves = []
    for seed in arguments.seeds[:1] if arguments.smoke else arguments.seeds:
        for name in arguments.runs:
            found = curve(name, seed, steps=3 if arguments.smoke else None)
            curves.append(found)
            print(f"{name}, seed {seed}: {100 * found.accuracy[-1]:.1f} % after {found.queries[-1]:,.0f}", flush=True)
    if not arguments.smoke:
        if arguments.merge:
            kept = [each for each in CurveResult.read(arguments.output).rows if each.run not in arguments.runs]
            order = list(RUNS)
            curves = sorted([*kept, *curves], key=lambda each: (each.seed, order.index(each.run)))
        result = CurveResult.measured_here(
            "deepzero", "Digits, an MLP with 1,210 parameters, batch 256; accuracy on 360 test rows", curves
        )
        result.write(Path(arguments.output))


if __name__ == "__main__":
    main()
