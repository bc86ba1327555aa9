"""The small experiment of robust mode connectivity: robust to three norms between networks that are robust to one.

    python -m benchmarks.robust_mode_connectivity [--smoke]

Fashion-MNIST, 8,000 rows, a small CNN with BatchNorm; radii 0.1 (linf), 1.5 (l2) and 12 (l1), PGD-50 of each in the
test on 1,000 rows, and their union. Two networks are trained against linf and l1 alone, and between them

* ``straight``: the best point of the straight segment, nothing trained;
* ``clean_curve``: the best point of a curve trained on clean inputs;
* ``rmc``: the best point of a curve trained against MSD, which meets all three norms;
* ``ermc``: the ensemble of three points of that curve;
* ``srmc``: as ``rmc``, but the second end is the first one, fine-tuned against l1;
* ``ends_ensemble``: the two networks vote;
* ``msd``: one network trained against MSD for as long as the ends and the curve together.

Points are chosen in validation. :func:`rows` gives one dict a run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_trust.attacks import MSD, PGD, Attack
from lightning_trust.callbacks import AdversarialTraining, CurveEvaluation, RobustEvaluation, RobustModeConnectivity
from lightning_trust.datamodules import FashionMNIST
from lightning_trust.functional.adversarial.projections import Norm
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import CurveNetwork, SmallCNN, WeightEnsemble

EPS: dict[Norm, float] = {"linf": 0.1, "l2": 1.5, "l1": 12.0}
STEP: dict[Norm, float] = {"linf": 0.025, "l2": 0.4, "l1": 1.0}
QUIET: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    train_rows: int = 8000
    val_rows: int = 500
    test_rows: int = 1000
    epochs: int = 6
    curve_epochs: int = 6
    tune_epochs: int = 2
    steps: int = 10
    test_steps: int = 50
    points: int = 11
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


def pgd(norm: Norm, steps: int, share: float = 1.0) -> Attack:
    """PGD at the radius of a norm."""
    return PGD(eps=EPS[norm], step_size=STEP[norm] * share, steps=steps, norm=norm)


def msd(size: Size) -> Attack:
    """The worst of three norms in each step; BatchNorm uses the statistics of the batch, as points of a curve need."""
    return MSD(
        eps_linf=EPS["linf"],
        eps_l2=EPS["l2"],
        eps_l1=EPS["l1"],
        step_linf=STEP["linf"],
        step_l2=STEP["l2"],
        step_l1=STEP["l1"],
        steps=size.steps,
        batch_norm="batch",
    )


def evaluations(size: Size, share: float = 0.4) -> dict[str, Attack]:
    """What networks are tested with."""
    return {norm: pgd(norm, size.test_steps, share) for norm in EPS}


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
        evaluation = RobustEvaluation(evaluations(size), folder=folder, examples=0, seed=0)
        trainer = pl.Trainer(**QUIET, callbacks=[evaluation], default_root_dir=folder)
        with contextlib.redirect_stdout(io.StringIO()):
            (found,) = trainer.test(ImageClassifier(network), datamodule=_data(size), verbose=False)
    robust = {name: found[f"trust/robust_acc/{name}"] for name in [*EPS, "union"]}
    return {"clean": found["trust/clean_acc"], **robust, "mean": sum(robust[norm] for norm in EPS) / len(EPS)}


def best_point(curve: CurveNetwork, size: Size) -> tuple[nn.Module, dict[str, float]]:
    """The point that is best in validation, its statistics re-estimated; where it is and the barriers."""
    with tempfile.TemporaryDirectory() as folder:
        # half the steps: a choice, not a figure
        attacks: dict[str, Attack] = {norm: pgd(norm, max(1, size.test_steps // 2), 0.4) for norm in EPS}
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
    return curve, _fit(curve, size, size.curve_epochs, 0.03, callbacks, wd=0.0)


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

    one = SmallCNN()
    spent = _fit(one, size, 2 * size.epochs + size.curve_epochs, 0.1, [AdversarialTraining(msd(size))])
    yield {"run": "msd", "seconds": spent, **tested(one, size)}


def rows(seeds: tuple[int, ...] = (1, 2, 3), size: Size | None = None) -> Iterator[dict[str, Any]]:
    """One dict a run and seed."""
    for seed in seeds:
        for row in measured(seed, size or Size()):
            yield {"seed": seed, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch, one seed: to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = Size(**{name: getattr(arguments, name) for name in vars(Size())})
    for row in rows((1,), SMOKE) if arguments.smoke else rows(tuple(arguments.seeds), size):
        shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
