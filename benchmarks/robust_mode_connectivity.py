"""The small experiment of robust mode connectivity: robust to three norms between networks that are robust to one.

    python -m benchmarks.robust_mode_connectivity [--seeds 1 2 3] [--smoke]

Fashion-MNIST, a small CNN with BatchNorm; radii 0.1 (linf), 1.5 (l2) and 12 (l1). Two networks are trained against linf
and l1 alone, and between them stand curves whose best points are chosen in validation; beside them one network is
trained on all three norms for as many epochs as the two ends and the curve together. Tested with PGD (linf, l2), APGD
(l1), and their union. Writes benchmarks/results/adversarial/robust_mode_connectivity.json.

Half an hour a seed on one quiet core, of which the three networks trained on all norms take two thirds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from benchmarks.silent_trainer import SILENT
from benchmarks.table_results import Column, TableResult, TableRow
from lightning_trust.attacks import APGD, MSD, PGD, Attack, WorstOf
from lightning_trust.callbacks import (
    AdversarialTraining,
    AverageOf,
    CurveEvaluation,
    ExtremeNormTraining,
    RobustEvaluation,
    RobustModeConnectivity,
)
from lightning_trust.datamodules import FashionMNIST
from lightning_trust.functional.adversarial.projections import Norm
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import CurveNetwork, SmallCNN, WeightEnsemble

EPS: dict[Norm, float] = {"linf": 0.1, "l2": 1.5, "l1": 12.0}
#: twice the way to the sphere within the steps; an l1 step of 0.01 has the length 0.2
SIZE: dict[Norm, float] = {"linf": 0.2, "l2": 3.0, "l1": 1.2}
#: run -> its name in tables
NAMES = {
    "at_linf": "AT, linf",
    "at_l1": "AT, l1",
    "ends_ensemble": "The two vote",
    "average": "Average of their weights",
    "straight": "Straight segment, best point",
    "clean_curve": "Curve trained on clean inputs, best point",
    "rmc": "RMC, best point",
    "ermc": "ERMC, three points vote",
    "srmc": "SRMC, best point",
    "msd": "MSD, one network",
    "max": "MAX (WorstOf), one network",
    "avg": "AVG (AverageOf), one network",
    "e_at": "E-AT, from the network of linf",
}
COLUMNS = {
    "union": Column("Union"),
    "linf": Column("linf"),
    "l2": Column("l2"),
    "l1": Column("l1"),
    "mean": Column("Mean"),
    "clean": Column("Clean"),
    "robust_barrier": Column("Barrier of the robust loss", "number"),
    "best_t": Column("t", "number"),
    "seconds": Column("Training", "seconds"),
}
QUIET = SILENT | {"accelerator": "auto", "devices": 1}


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    train_rows: int = 5000
    val_rows: int = 400
    test_rows: int = 1000
    epochs: int = 4
    curve_epochs: int = 4
    tune_epochs: int = 2
    steps: int = 5
    test_steps: int = 20
    points: int = 6
    batch: int = 128


SMOKE = Size(
    train_rows=64,
    val_rows=20,
    test_rows=20,
    epochs=1,
    curve_epochs=1,
    tune_epochs=1,
    steps=1,
    test_steps=1,
    points=3,
    batch=32,
)


def pgd(norm: Norm, steps: int) -> Attack:
    """PGD at the radius of a norm."""
    return PGD(eps=EPS[norm], step_size=SIZE[norm] / steps, steps=steps, norm=norm)


def msd(size: Size) -> MSD:
    """The worst of three norms in each step; BatchNorm uses the statistics of the batch, as points of a curve need."""
    return MSD(
        eps_linf=EPS["linf"],
        eps_l2=EPS["l2"],
        eps_l1=EPS["l1"],
        step_linf=SIZE["linf"] / size.steps,
        step_l2=SIZE["l2"] / size.steps,
        step_l1=SIZE["l1"] / size.steps,
        steps=size.steps,
        batch_norm="batch",
    )


def evaluations(steps: int) -> dict[str, Attack]:
    """What networks are tested with: PGD is weak in l1."""
    l1 = APGD(eps=EPS["l1"], norm="l1", steps=steps)
    return {"linf": pgd("linf", steps), "l2": pgd("l2", steps), "l1": l1}


@functools.cache
def _data(size: Size) -> pl.LightningDataModule:
    return FashionMNIST(
        train_rows=size.train_rows, val_rows=size.val_rows, test_rows=size.test_rows, batch_size=size.batch
    )


def _fit(
    network: nn.Module, size: Size, epochs: int, lr: float, callbacks: list[pl.Callback], wd: float = 5e-4
) -> float:
    """Train in place; seconds."""
    sgd = functools.partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=wd)
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, limit_val_batches=0, callbacks=callbacks)
    start = time.perf_counter()
    trainer.fit(ImageClassifier(network, optimizer=sgd), datamodule=_data(size))
    return time.perf_counter() - start


def tested(network: nn.Module, size: Size) -> dict[str, float]:
    """Accuracies on the test rows, in [0, 1]."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation = RobustEvaluation(evaluations(size.test_steps), folder=folder, examples=0, seed=0)
        trainer = pl.Trainer(**QUIET, callbacks=[evaluation], default_root_dir=folder)
        with contextlib.redirect_stdout(io.StringIO()):
            (found,) = trainer.test(ImageClassifier(network), datamodule=_data(size), verbose=False)
    robust = {name: found[f"trust/robust_acc/{name}"] for name in [*EPS, "union"]}
    return {"clean": found["trust/clean_acc"], **robust, "mean": sum(robust[norm] for norm in EPS) / len(EPS)}


def best_point(curve: CurveNetwork, size: Size) -> tuple[nn.Module, dict[str, float]]:
    """The point that is best in validation, its statistics re-estimated; where it is and the barriers."""
    with tempfile.TemporaryDirectory() as folder:
        # half the steps: a choice, not a figure
        attacks = evaluations(max(1, size.test_steps // 2))
        evaluation = CurveEvaluation(attacks, num_points=size.points, folder=folder, seed=0)
        trainer = pl.Trainer(**QUIET, callbacks=[evaluation], default_root_dir=folder)
        (found,) = trainer.validate(ImageClassifier(curve), datamodule=_data(size), verbose=False)
    point = curve.export(found["trust/curve/best_t"])
    update_bn(_train_loader(size), point)
    barriers = {name: found[f"trust/curve/{name}"] for name in ("barrier", "robust_barrier")}
    return point, {"best_t": found["trust/curve/best_t"], **barriers}


def _train_loader(size: Size) -> Any:
    data = _data(size)
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def _curve(start: nn.Module, end: nn.Module) -> CurveNetwork:
    curve = CurveNetwork(copy.deepcopy(start))
    curve.load_endpoint(start.state_dict(), "start")
    curve.load_endpoint(end.state_dict(), "end")
    curve.init_linear()
    return curve


def _trained_curve(start: nn.Module, end: nn.Module, size: Size, attack: Attack | None) -> tuple[CurveNetwork, float]:
    curve = _curve(start, end)
    callbacks: list[pl.Callback] = [RobustModeConnectivity()]
    if attack is not None:
        callbacks.append(AdversarialTraining(attack))
    # a bend moves the middle of the curve half as far: 0.1 for the paper's 0.03, which takes 50 epochs
    return curve, _fit(curve, size, size.curve_epochs, 0.1, callbacks, wd=0.0)


def measured(seed: int, size: Size) -> Iterator[dict[str, Any]]:
    """One dict a run: name, accuracies in [0, 1], seconds of all the training that it takes."""
    pl.seed_everything(seed, verbose=False)
    ends: dict[Norm, nn.Module] = {}
    seconds: dict[Norm, float] = {}
    norms: tuple[Norm, ...] = ("linf", "l1")
    for norm in norms:
        ends[norm] = SmallCNN()
        seconds[norm] = _fit(ends[norm], size, size.epochs, 0.1, [AdversarialTraining(pgd(norm, size.steps))])
        yield {"run": f"at_{norm}", "seconds": seconds[norm], **tested(ends[norm], size)}
    both = sum(seconds.values())
    start, end = ends["linf"], ends["l1"]
    yield {"run": "ends_ensemble", "seconds": both, **tested(WeightEnsemble(list(ends.values())), size)}

    half = _curve(start, end).export(0.5)
    update_bn(_train_loader(size), half)
    yield {"run": "average", "seconds": both, **tested(half, size)}
    point, where = best_point(_curve(start, end), size)
    yield {"run": "straight", "seconds": both, **tested(point, size), **where}
    curve, spent = _trained_curve(start, end, size, None)
    point, where = best_point(curve, size)
    yield {"run": "clean_curve", "seconds": both + spent, **tested(point, size), **where}
    curve, spent = _trained_curve(start, end, size, msd(size))
    point, where = best_point(curve, size)
    yield {"run": "rmc", "seconds": both + spent, **tested(point, size), **where}
    ensemble = WeightEnsemble.of_curve(curve, [0.2, 0.5, 0.8])
    update_bn(_train_loader(size), ensemble)
    yield {"run": "ermc", "seconds": both + spent, **tested(ensemble, size)}

    tuned = copy.deepcopy(start)
    tuning = _fit(tuned, size, size.tune_epochs, 0.03, [AdversarialTraining(pgd("l1", size.steps))])
    curve, spent = _trained_curve(start, tuned, size, msd(size))
    point, where = best_point(curve, size)
    yield {"run": "srmc", "seconds": seconds["linf"] + tuning + spent, **tested(point, size), **where}

    norms_at_once = [pgd(norm, size.steps) for norm in EPS]
    strategies: dict[str, pl.Callback] = {
        "msd": AdversarialTraining(msd(size).replaced(batch_norm="eval")),
        "max": AdversarialTraining(WorstOf(norms_at_once)),
        "avg": AdversarialTraining(objective=AverageOf(norms_at_once)),
    }
    for name, strategy in strategies.items():
        one = SmallCNN()
        spent = _fit(one, size, 2 * size.epochs + size.curve_epochs, 0.1, [strategy])
        yield {"run": name, "seconds": spent, **tested(one, size)}
    one = copy.deepcopy(start)
    extremes = ExtremeNormTraining([pgd(norm, size.steps) for norm in norms])
    spent = _fit(one, size, size.tune_epochs, 0.03, [extremes])
    yield {"run": "e_at", "seconds": seconds["linf"] + spent, **tested(one, size)}


def rows(seeds: tuple[int, ...] = (1, 2, 3), size: Size | None = None) -> Iterator[TableRow]:
    """One row a run and seed."""
    for seed in seeds:
        for found in measured(seed, size or Size()):
            values = {name: found.get(name) for name in COLUMNS}
            yield TableRow(NAMES[found["run"]], seed, "Fashion-MNIST", values)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch, one seed: to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output", default="benchmarks/results/adversarial/robust_mode_connectivity.json")
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = SMOKE if arguments.smoke else Size(**{name: getattr(arguments, name) for name in asdict(Size())})
    seeds = [1] if arguments.smoke else arguments.seeds
    found = []
    for row in rows(tuple(seeds), size):
        shown = {name: None if value is None else round(value, 3) for name, value in row.values.items()}
        print(f"  seed {row.seed}, {row.run}: {shown}", flush=True)
        found.append(row)
    if arguments.smoke:
        return
    TableResult.measured_here(
        "robust-mode-connectivity",
        experiment=f"Fashion-MNIST, {size.train_rows:,} rows, a small CNN with 33,338 parameters; {size.epochs} epochs"
        f" an end, {size.curve_epochs} a curve, {2 * size.epochs + size.curve_epochs} for one network; attacks of"
        f" {size.steps} steps in training, of {size.test_steps} in the test on {size.test_rows:,} rows;"
        " eps 0.1 (linf), 1.5 (l2), 12 (l1)",
        columns=COLUMNS,
        rows=found,
    ).write(Path(arguments.output))


if __name__ == "__main__":
    main()
