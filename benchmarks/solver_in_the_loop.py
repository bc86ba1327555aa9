"""Solver in the loop: what a correction of a coarse solver of Burgers' equation learns, and how it is trained.

    python -m benchmarks.solver_in_the_loop [--smoke] [--seeds 1 2 3]

A convolution network of 89 weights corrects a solver on 32 cells after every step; the truth is a solver of higher
order with eight times the cells and sixteen times the steps. 64 trajectories cut into windows of 8 steps, Adam at a
constant rate, the best of :data:`RATES` on validation rollouts of another seed; tested on rollouts of 32 steps from new
states.

* solver alone: no correction;
* NON: trained on single steps of the true trajectories;
* ZO-SOL: trained through the rollout by differences of the loss at each weight; nothing is differentiated;
* through estimated Jacobians: back-propagation, but the solver's part from its answers;
* differentiable twin: back-propagation through the solver, written anew in torch.

Writes benchmarks/results/zeroth_order/solver_in_the_loop.json.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# one thread: the network is small
torch.set_num_threads(1)

import lightning.pytorch as pl  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.silent_trainer import SILENT  # noqa: E402
from benchmarks.table_results import Column, TableResult, TableRow  # noqa: E402
from lightning_trust.callbacks import ZerothOrderGradient  # noqa: E402
from lightning_trust.datamodules import BurgersDataModule, burgers_step  # noqa: E402
from lightning_trust.datamodules.zeroth_order.burgers import CELLS, STEP, VISCOSITY  # noqa: E402
from lightning_trust.modules import SolverCorrection  # noqa: E402
from lightning_trust.nn import BlackBoxLayer, PeriodicConvNet  # noqa: E402
from lightning_trust.optim import CGE  # noqa: E402

QUIET = SILENT | {"devices": 1, "num_sanity_val_steps": 0}
COLUMNS = {
    "mae": Column("MAE, 32 steps", "number"),
    "mae_end": Column("MAE after them", "number"),
    "mae_short": Column("MAE, 8 steps", "number"),
    "states": Column("States solved in training, thousands", "number"),
    "seconds": Column("Training", "seconds"),
    "rate": Column("Learning rate x 1,000", "number"),
}
STEPS = 400
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SHORT = 8


def twin(states: Tensor) -> Tensor:
    """A step of the coarse solver in torch."""
    width = 1.0 / CELLS
    right = states.roll(-1, dims=-1)
    fastest = torch.maximum(states.abs(), right.abs())
    flux = (states.square() + right.square()) / 4.0 - fastest * (right - states) / 2.0
    flux = flux - VISCOSITY * (right - states) / width
    return states - STEP / width * (flux - flux.roll(1, dims=-1))


def asked() -> BlackBoxLayer:
    """The solver as something that only answers."""
    return BlackBoxLayer(burgers_step, out_dim=CELLS, estimator="cge", mu=1e-3, scale=1.0)


#: name in tables -> the solver, whether training goes through rollouts, and what is added to the Trainer
METHODS: dict[str, tuple[Callable[[], BlackBoxLayer], bool, Callable[[], list[pl.Callback]]]] = {
    "NON": (asked, False, list),
    "ZO-SOL": (asked, True, lambda: [ZerothOrderGradient(CGE(mu=1e-3, central=True))]),
    "through estimated Jacobians": (asked, True, list),
    "differentiable twin": (lambda: BlackBoxLayer(twin, out_dim=CELLS, direct=True), True, list),
}


def trained(name: str, seed: int, rate: float, steps: int) -> tuple[SolverCorrection, dict[str, float | None]]:
    """A trained correction, and what it took."""
    make, interactive, callbacks = METHODS[name]
    pl.seed_everything(seed, verbose=False)
    adam = functools.partial(torch.optim.Adam, lr=rate)
    module = SolverCorrection(make(), PeriodicConvNet(), interactive, adam)
    trainer = pl.Trainer(**QUIET, max_steps=steps, limit_val_batches=0, gradient_clip_val=1.0, callbacks=callbacks())
    start = time.perf_counter()
    trainer.fit(module, BurgersDataModule(seed=seed))
    seconds = time.perf_counter() - start
    simulator = module.solver.simulator
    states = None if simulator is None else simulator.counts.queries / 1000.0
    return module, {"states": states, "seconds": seconds, "rate": 1000.0 * rate}


def validated(name: str, rate: float, steps: int) -> float:
    """MAE of validation rollouts of a seed that no table has; what is not finite is the worst."""
    module, _ = trained(name, 0, rate, steps)
    (found,) = pl.Trainer(**QUIET).validate(module, BurgersDataModule(seed=0), verbose=False)
    return float("inf") if math.isnan(found["val/mae"]) else found["val/mae"]


@torch.no_grad()
def tested(module: SolverCorrection, seed: int) -> dict[str, float]:
    """Errors in hundredths of the largest state that there can be at the start."""
    data = BurgersDataModule(seed=seed)
    (found,) = pl.Trainer(**QUIET).test(module, data, verbose=False)
    states, trajectories = data.test_dataset[:]
    short = (module(states, SHORT) - trajectories[:, :SHORT]).abs().mean()
    return {
        "mae": 100.0 * found["test/mae"],
        "mae_end": 100.0 * found["test/mae_end"],
        "mae_short": 100.0 * float(short),
    }


def rows_of(seeds: list[int], steps: int = STEPS, rates: tuple[float, ...] = RATES) -> list[TableRow]:
    """All runs."""
    found = []

    def add(name: str, seed: int, values: dict[str, Any]) -> None:
        found.append(TableRow(name, seed, "", {column: values.get(column) for column in COLUMNS}))
        print(
            name, seed, {key: None if value is None else round(value, 3) for key, value in values.items()}, flush=True
        )

    for seed in seeds:
        # a correction that was not trained is none
        add("solver alone", seed, tested(SolverCorrection(asked(), PeriodicConvNet()), seed))
    for name in METHODS:
        errors = {rate: validated(name, rate, steps) for rate in rates} if len(rates) > 1 else {rates[0]: 0.0}
        best = min(errors, key=lambda rate: errors[rate])
        print(name, {rate: round(100.0 * error, 3) for rate, error in errors.items()}, flush=True)
        for seed in seeds:
            module, cost = trained(name, seed, best, steps)
            add(name, seed, {**tested(module, seed), **cost})
    return found


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps, one seed: to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", default="benchmarks/results/zeroth_order/solver_in_the_loop.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.smoke:
        rows_of([1], steps=2, rates=(1e-3,))
        return
    TableResult.measured_here(
        "deepzero",
        experiment="Burgers' equation on 32 cells, viscosity 0.005, a correction of 89 weights after every step;"
        f" {STEPS} steps of Adam on batches of 32 windows of 8 steps; 64 test rollouts; errors in hundredths of the"
        " largest initial state",
        columns=COLUMNS,
        rows=rows_of(arguments.seeds),
    ).write(Path(arguments.output))


if __name__ == "__main__":
    main()
