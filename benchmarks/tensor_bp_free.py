"""The small experiments of tensor-compressed training that are about differential equations.

    python -m benchmarks.tensor_bp_free [--smoke]

* Poisson in 2 and 3 dimensions and the heat equation in 2 + 1: a dense network, derivatives from autograd, a sparse
  grid, random directions (1,024 draws a point, and as many evaluations as the grid has nodes) and finite differences;
* the 20-dimensional HJB equation: 300 steps of 16 points, the dense network of 274,433 parameters and its tensor-train
  twin of 1,929. Its lift leaves the network a constant to learn: the first line of its table is that of a network that
  was not trained.

Every run of an experiment goes through every entry of :data:`TRAININGS`, which says where the gradient of the weights
comes from; :func:`rows` gives one dict a run and seed. Writes benchmarks/results/zeroth_order/tensor_bp_free.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import lightning.pytorch as pl  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.lr_scheduler import CosineAnnealingLR  # noqa: E402

from benchmarks.table_results import Column, TableResult, TableRow  # noqa: E402
from lightning_trust.datamodules import HJB20, Heat, PDEDataModule, PDEProblem, Poisson  # noqa: E402
from lightning_trust.modules import PINNModule  # noqa: E402
from lightning_trust.nn import (  # noqa: E402
    AutogradDerivatives,
    DerivativeEstimator,
    FiniteDifference,
    SineMLP,
    SparseGridDerivatives,
    SteinDerivatives,
    tensorize,
)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
#: shapes of the paper's network for the HJB equation
HJB_SHAPES = {"0": ((1, 1, 3, 7), (8, 4, 4, 4)), "1": ((4, 4, 4, 8), (8, 4, 4, 4))}


@dataclass(frozen=True)
class Training:
    """Where the gradient of the weights comes from.

    ``optimizer`` is called with the parameters and the learning rate of a run; ``callbacks`` makes what the Trainer
    gets; ``steps`` multiplies the steps of a run, and ``lr`` its learning rate.
    """

    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    callbacks: Callable[[], list[pl.Callback]] = list
    steps: int = 1
    lr: float = 1.0


#: name in tables -> training; zeroth-order ones go here, with `ZerothOrderGradient` among their callbacks
TRAININGS: dict[str, Training] = {"back-propagation": Training()}


@dataclass(frozen=True)
class Run:
    """One run: what differs between the rows of the tables."""

    scenario: str
    pde: PDEProblem
    network: Callable[[], nn.Module]
    derivatives: Callable[[int], DerivativeEstimator]
    lr: float = 1e-2
    steps: int = 600
    points: int = 64
    test_points: int = 2000


def grid_and_rivals(dim: int, sigma: float) -> dict[str, Callable[[int], DerivativeEstimator]]:
    """Name of an estimator -> what makes it from a seed."""
    draws = (SparseGridDerivatives(dim, 3, sigma).points_per_point(dim) - 1) // 2
    return {
        "autograd": lambda seed: AutogradDerivatives(),
        "sparse grid": lambda seed: SparseGridDerivatives(dim, 3, sigma),
        f"Stein, {draws} draws": lambda seed: SteinDerivatives(draws, sigma, seed),
        "Stein, 1024 draws": lambda seed: SteinDerivatives(1024, sigma, seed),
        "finite differences": lambda seed: FiniteDifference(1e-2),
    }


def _dense() -> nn.Module:
    return SineMLP(21, 512, 3, 1)


def _small() -> nn.Module:
    return tensorize(_dense(), rank=2, shapes=HJB_SHAPES)


def runs() -> dict[tuple[str, str], Run]:
    """(scenario, name in its table) -> run."""
    found: dict[tuple[str, str], Run] = {}
    problems: dict[str, PDEProblem] = {
        "Poisson, 2 dimensions": Poisson(2),
        "Poisson, 3 dimensions": Poisson(3),
        "heat, 2 + 1 dimensions": Heat(2),
    }
    for scenario, pde in problems.items():
        dim = pde.num_coordinates
        for name, derivatives in grid_and_rivals(dim, 0.05).items():
            lr = 2e-2 if dim > 2 else 1e-2
            found[scenario, name] = Run(scenario, pde, lambda dim=dim: SineMLP(dim, 32, 3, 1), derivatives, lr)
    scenario, pde = "HJB, 20 + 1 dimensions", HJB20()
    hjb = {"lr": 1e-3, "steps": 300, "points": 16, "test_points": 500}
    rivals = grid_and_rivals(21, 0.1)
    found[scenario, "tensor train, not trained"] = Run(
        scenario, pde, _small, rivals["sparse grid"], **{**hjb, "steps": 0}
    )
    for name, derivatives in rivals.items():
        if not name.startswith("Stein, 1024"):
            found[scenario, f"tensor train, {name}"] = Run(scenario, pde, _small, derivatives, **hjb)
    for name in ("autograd", "sparse grid"):
        found[scenario, f"dense, {name}"] = Run(scenario, pde, _dense, rivals[name], **hjb)
    return found


COLUMNS = {
    "rel_l2": Column("Relative L2 error"),
    "rel_l2_smoothed": Column("of the smoothed network"),
    "residual": Column("Mean squared residual", "number"),
    "points_per_point": Column("Evaluations a point", "number"),
    "parameters": Column("Parameters", "number"),
    "evaluations": Column("Evaluations in training", "number"),
    "seconds": Column("Seconds", "seconds"),
}


def measured(run: Run, training: Training, seed: int) -> dict[str, Any]:
    """Train and test one run."""
    pl.seed_everything(seed, verbose=False)
    steps = run.steps * training.steps
    derivatives = run.derivatives(seed)
    module = PINNModule(
        run.network(),
        run.pde,
        derivatives,
        optimizer=lambda params: training.optimizer(params, lr=run.lr * training.lr),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, max(1, steps)),
    )
    data = PDEDataModule(
        run.pde, run.points, steps_per_epoch=max(1, steps), val_points=0, test_points=run.test_points, seed=seed
    )
    trainer = pl.Trainer(**QUIET, max_steps=steps, callbacks=training.callbacks())
    start = time.perf_counter()
    if steps:
        trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    evaluations = derivatives.evaluations
    (result,) = pl.Trainer(**QUIET).test(module, datamodule=data, verbose=False)
    return {
        "rel_l2": result["test/rel_l2"],
        "rel_l2_smoothed": result["test/rel_l2_smoothed"],
        "residual": result["test/loss"],
        "points_per_point": derivatives.points_per_point(run.pde.num_coordinates),
        "parameters": sum(parameter.numel() for parameter in module.net.parameters()),
        "evaluations": evaluations,
        "seconds": seconds,
    }


def rows(
    seeds: tuple[int, ...] = (1, 2, 3),
    chosen: dict[tuple[str, str], Run] | None = None,
    trainings: dict[str, Training] | None = None,
) -> Iterator[dict[str, Any]]:
    """One dict a run, training and seed: ``run``, ``seed``, ``scenario`` and what :func:`measured` gives."""
    for (scenario, name), run in (chosen or runs()).items():
        for label, training in (trainings or TRAININGS).items():
            if run.steps == 0 and label != next(iter(trainings or TRAININGS)):
                continue
            for seed in seeds:
                shown = name if run.steps == 0 else f"{name}, {label}"
                yield {"run": shown, "seed": seed, "scenario": scenario, **measured(run, training, seed)}


def smoke() -> dict[tuple[str, str], Run]:
    """Every run, of two steps."""
    return {
        key: replace(run, steps=min(run.steps, 2), points=2, test_points=3)
        for key, run in runs().items()
        if not key[1].startswith("dense")
    }


def write(found: list[dict[str, Any]], path: Path) -> Path:
    """Write the rows as a result."""
    result = TableResult.measured_here(
        "tensor_bp_free",
        experiment="A sine network of 3 layers of 32 trained for 600 steps of 64 points on equations whose lifted"
        " solution is no constant; the 20-dimensional HJB equation, 300 steps of 16 points, 512 wide, rank 2",
        columns=COLUMNS,
        rows=[
            TableRow(row["run"], row["seed"], row["scenario"], {name: float(row[name]) for name in COLUMNS})
            for row in found
        ],
    )
    return result.write(path)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two steps, one seed: to see that it runs")
    parser.add_argument("--scenarios", nargs="+", help="words of the scenarios to run; all by default")
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=list(TRAININGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", default="benchmarks/results/zeroth_order/tensor_bp_free.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chosen = {
        key: run
        for key, run in (smoke() if arguments.smoke else runs()).items()
        if arguments.scenarios is None or any(word in key[0] for word in arguments.scenarios)
    }
    trainings = {name: TRAININGS[name] for name in arguments.trainings}
    found = []
    for row in rows((1,) if arguments.smoke else tuple(arguments.seeds), chosen, trainings):
        print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        found.append(row)
    if not arguments.smoke:
        write(found, Path(arguments.output))


if __name__ == "__main__":
    main()
