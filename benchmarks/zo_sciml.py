"""The small experiments of zeroth-order SciML: a simulator in the network against everything that does without.

    python -m benchmarks.zo_sciml [--smoke]

* ``elements``: densities of the elements (measured), five folds, trained on 20, 40 and 80 % of 61 elements. The network
  predicts the lattice constant; crystallography, which is only asked, turns it into a density.
* ``oscillator``: later displacements of a damped oscillator from 16 noisy ones, trained on 20, 50 and 200 rows. The
  network predicts stiffness and damping; a solver of differential equations, which is only asked, goes on from there.

Every method has the same encoder (two layers of 32, tanh), the same number of steps of Adam on whole batches with the
norm of the gradient clipped at 1, and that learning rate of :data:`RATES` which is best on validation rows of another
seed.

Writes benchmarks/results/zeroth_order/zo_sciml.json.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# one thread: the networks are small
torch.set_num_threads(1)

from benchmarks import zo_sciml_baselines as methods  # noqa: E402
from benchmarks.table_results import Column, TableResult, TableRow  # noqa: E402
from benchmarks.zo_sciml_problems import WIDTH, Fitted, Problem, elements, oscillator  # noqa: E402

COLUMNS = {
    "rmse": Column("Test RMSE", "number"),
    "mae": Column("Test MAE", "number"),
    "r2": Column("R2", "number"),
    "queries": Column("Queries, thousands", "number"),
    "cosine": Column("Cosine to the true gradient", "number"),
    "failed": Column("Failed calls"),
    "rate": Column("Learning rate x 1,000", "number"),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS = 200
FOLDS = 5
#: name in tables -> method
METHODS: dict[str, Callable[..., Fitted | None]] = {
    "data only": methods.data_only,
    "simulator alone": methods.nominal,
    "two-stage": methods.two_stage,
    "surrogate": methods.surrogate,
    "straight-through": methods.straight_through,
    "score function": methods.score_function,
    "full ZO": methods.full_zo,
    "RGE, q = 4": methods.estimated("rge", 4),
    "CGE": methods.estimated("cge"),
    "differentiable twin": methods.twin,
}
#: in words -> how its parts are made
SCENARIOS: dict[str, tuple[Callable[..., Problem], float, int]] = {
    **{f"elements, {share:.0%} of 61".replace("%", " %"): (elements, share, FOLDS) for share in (0.2, 0.4, 0.8)},
    **{f"oscillator, {count} rows": (oscillator, count, 1) for count in (20, 50, 200)},
}


def measured(problems: list[Problem], method: Callable[..., Fitted | None], seed: int, rate: float, steps: int) -> Any:
    """One row's values, over all folds; None where the method does not apply."""
    errors, targets = [], []
    queries = failures = 0
    cosines: list[float] = []
    for problem in problems:
        fitted = method(problem, seed, rate, steps)
        if fitted is None:
            return None
        x, y = problem.test
        errors.append(fitted.predict(x) - y)
        targets.append(y)
        queries += fitted.queries
        failures += fitted.failures
        cosines += fitted.cosines
    absolute = problems[0].unit * torch.cat(errors).abs()
    squared = absolute.square()
    every = problems[0].unit * torch.cat(targets)
    spread = (every - every.mean(dim=0)).square()
    return {
        "rmse": float(squared.mean().sqrt()),
        "mae": float(absolute.mean()),
        "r2": float((1.0 - squared.sum(dim=0) / spread.sum(dim=0)).mean()),
        "queries": queries / len(problems) / 1000.0,
        "cosine": sum(cosines) / len(cosines) if cosines else None,
        "failed": failures / queries if queries else None,
        "rate": 1000.0 * rate,
    }


@functools.lru_cache
def best_rate(
    make: Callable[..., Problem], method: Callable[..., Fitted | None], steps: int, rates: tuple[float, ...]
) -> float:
    """The learning rate with the smallest error on validation rows of a seed that no table has, at middle size."""
    if method is methods.nominal or len(rates) == 1:
        return rates[0]
    size, folds = {elements: (0.4, 2), oscillator: (50, 1)}[make]
    problems = [make(size, 0, fold, validate=True) for fold in range(folds)]
    found = {rate: measured(problems, method, 0, rate, steps) for rate in rates}
    return min(rates, key=lambda rate: float("inf") if found[rate] is None else found[rate]["rmse"])


def rows(
    seeds: tuple[int, ...] = (1, 2, 3),
    steps: int = STEPS,
    rates: tuple[float, ...] = RATES,
    scenarios: tuple[str, ...] = tuple(SCENARIOS),
) -> Iterator[TableRow]:
    """All runs; the rate of a method is chosen once a kind of problem."""
    for scenario in scenarios:
        make, size, folds = SCENARIOS[scenario]
        for name, method in METHODS.items():
            rate = best_rate(make, method, steps, rates)
            for seed in seeds:
                problems = [make(size, seed, fold) for fold in range(folds)]
                values = measured(problems, method, seed, rate, steps)
                if values is not None:
                    if name in ("data only", "simulator alone"):
                        values["queries"] = None
                    yield TableRow(name, seed, scenario, values)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two scenarios, one seed, a few steps; writes nothing")
    parser.add_argument("--out", default="benchmarks/results/zeroth_order/zo_sciml.json")
    options = parser.parse_args(arguments)
    if options.smoke:
        small = (next(iter(SCENARIOS)), "oscillator, 20 rows")
        for row in rows(seeds=(1,), steps=3, rates=(1e-2,), scenarios=small):
            print(row)
        return
    found = []
    for row in rows():
        print(row, flush=True)
        found.append(row)
    words = (
        "Densities of 61 elements in five folds (g/cm3), and 200 damped oscillators (hundredths of the first"
        " displacement); the same encoder of two layers of"
        f" {WIDTH} and {STEPS} steps of Adam on whole batches for all, the learning rate chosen on validation"
        " rows; queries of one training"
    )
    print(TableResult.measured_here("zo-sciml", words, found, columns=COLUMNS).write(Path(options.out)))


if __name__ == "__main__":
    main()
