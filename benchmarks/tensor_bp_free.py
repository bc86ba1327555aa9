"""The small experiments of tensor-compressed training.

    python -m benchmarks.tensor_bp_free [--smoke]

* 10,000 images of Fashion-MNIST (benchmarks/tensor_bp_free_images.py);
* Poisson in 2 and 3 dimensions and the heat equation in 2 + 1: a dense network trained by back-propagation, derivatives
  from autograd, a sparse grid, random directions (1,024 draws a point, and as many evaluations as the grid has nodes)
  and finite differences; Poisson in 2 dimensions also from losses alone, dense and in tensor-train form;
* the 20-dimensional HJB equation: 300 steps of 16 points, the dense network of 274,433 parameters and its tensor-train
  twin of 1,929. Its lift leaves the network a constant to learn: the first line of its table is that of a network that
  was not trained.

Every run of an equation goes through the entries of :data:`TRAININGS` that it names, which say where the gradient of
the weights comes from; :func:`rows` gives one dict a run and seed. Writes
benchmarks/results/zeroth_order/tensor_bp_free.json. ``--rows FILE`` collects rows of several calls.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import lightning.pytorch as pl  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.lr_scheduler import LambdaLR  # noqa: E402

from benchmarks.silent_trainer import SILENT  # noqa: E402
from benchmarks.table_results import Column, TableResult, TableRow  # noqa: E402
from benchmarks.tensor_bp_free_images import SCENARIO, image_runs, measured_images  # noqa: E402
from lightning_trust.callbacks import ZerothOrderGradient  # noqa: E402
from lightning_trust.core.schedules import Cosine  # noqa: E402
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
from lightning_trust.optim import HybridZO  # noqa: E402

QUIET = SILENT | {"num_sanity_val_steps": 0}
#: shapes of the paper's network for the HJB equation
HJB_SHAPES = {"0": ((1, 1, 3, 7), (8, 4, 4, 4)), "1": ((4, 4, 4, 8), (8, 4, 4, 4))}


@dataclass(frozen=True)
class Training:
    """Where the gradient of the weights comes from.

    ``optimizer`` is called with the parameters and a run; ``steps`` with a run and its number of weights, and gives the
    steps of the first epoch and those after it. The learning rate falls to ``end`` times itself in the first epoch.
    """

    optimizer: Callable[[Any, Run], torch.optim.Optimizer]
    steps: Callable[[Run, int], tuple[int, int]]
    callbacks: Callable[[], list[pl.Callback]] = lambda: [ZerothOrderGradient()]
    end: float = 0.05


@dataclass(frozen=True)
class Run:
    """One run of an equation: what differs between the rows of the tables.

    Trainings from losses alone have about ``losses`` of them.
    """

    scenario: str
    pde: PDEProblem
    network: Callable[[], nn.Module]
    derivatives: Callable[[int], DerivativeEstimator]
    lr: float = 1e-2
    steps: int = 600
    points: int = 64
    test_points: int = 2000
    trainings: tuple[str, ...] = ("back-propagation",)
    losses: int = 40_000


#: directions of a random estimate, of which each takes two losses
Q = 10


def _values(first: float, **settings: Any) -> Callable[[Any, Run], torch.optim.Optimizer]:
    return lambda params, run: HybridZO(
        params, lr=first, mu=1e-3, q=Q, coordinate_dropout=0.5, switch="epoch", **settings
    )


#: name in tables -> training
TRAININGS: dict[str, Training] = {
    "back-propagation": Training(
        lambda params, run: torch.optim.Adam(params, lr=run.lr), lambda run, d: (run.steps, 0), list, 0.0
    ),
    # half of the losses for each phase; at the end of the fall the second has the rate 5e-5
    "HybridZO": Training(
        _values(1e-2, switch_epoch=1, coordinate_lr=1e-3),
        lambda run, d: (run.losses // (4 * Q), run.losses // 2 // (d + 1)),
    ),
    "RGE": Training(_values(1e-2, switch_epoch=1_000_000), lambda run, d: (run.losses // (2 * Q), 0)),
    "CGE": Training(_values(1e-2, switch_epoch=0, coordinate_lr=1e-4), lambda run, d: (run.losses // (d + 1), 0)),
}


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


def _poisson() -> nn.Module:
    return tensorize(SineMLP(2, 32, 3, 1), rank=4, shapes={"1": ((2, 4, 4), (4, 4, 2))})


def _dense() -> nn.Module:
    return SineMLP(21, 512, 3, 1)


def _small() -> nn.Module:
    return tensorize(_dense(), rank=2, shapes=HJB_SHAPES)


def runs() -> dict[tuple[str, str], Run]:
    """(scenario, name in its table) -> run."""
    found: dict[tuple[str, str], Run] = {}
    problems: dict[str, tuple[PDEProblem, float, int]] = {
        "Poisson, 2 dimensions": (Poisson(2), 1e-2, 600),
        "Poisson, 3 dimensions": (Poisson(3), 2e-2, 600),
        "heat, 2 + 1 dimensions": (Heat(2), 5e-3, 2000),
    }
    for scenario, (pde, lr, steps) in problems.items():
        dim = pde.num_coordinates
        for name, derivatives in grid_and_rivals(dim, 0.05).items():
            values = ("back-propagation", "RGE") if dim == 2 and name == "sparse grid" else ("back-propagation",)
            network = lambda dim=dim: SineMLP(dim, 32, 3, 1)  # noqa: E731
            found[scenario, f"dense, {name}"] = Run(scenario, pde, network, derivatives, lr, steps, trainings=values)
    scenario = "Poisson, 2 dimensions"
    grid = grid_and_rivals(2, 0.05)["sparse grid"]
    found[scenario, "tensor train, sparse grid"] = Run(scenario, Poisson(2), _poisson, grid, trainings=tuple(TRAININGS))
    scenario, pde = "HJB, 20 + 1 dimensions", HJB20()
    hjb = {"lr": 1e-3, "steps": 300, "points": 16, "test_points": 500}
    rivals = grid_and_rivals(21, 0.1)
    found[scenario, "tensor train, not trained"] = Run(
        scenario, pde, _small, rivals["sparse grid"], **{**hjb, "steps": 0}
    )
    for name, derivatives in rivals.items():
        if not name.startswith("Stein, 1024"):
            values = ("back-propagation", "RGE") if name == "sparse grid" else ("back-propagation",)
            found[scenario, f"tensor train, {name}"] = Run(
                scenario, pde, _small, derivatives, **hjb, trainings=values, losses=400
            )
    for name in ("autograd", "sparse grid"):
        found[scenario, f"dense, {name}"] = Run(scenario, pde, _dense, rivals[name], **hjb)
    return found


COLUMNS = {
    "accuracy": Column("Test accuracy"),
    "rel_l2": Column("Relative L2 error"),
    "rel_l2_smoothed": Column("of the smoothed network"),
    "residual": Column("Mean squared residual", "number"),
    "parameters": Column("Parameters", "number"),
    "steps": Column("Steps", "number"),
    "losses": Column("Losses asked", "number"),
    "points_per_point": Column("Network evaluations a point and loss", "number"),
    "seconds": Column("Seconds", "seconds"),
}


def measured(run: Run, training: Training, seed: int) -> dict[str, Any]:
    """Train and test one run."""
    pl.seed_everything(seed, verbose=False)
    derivatives = run.derivatives(seed)
    net = run.network()
    weights = sum(parameter.numel() for parameter in net.parameters())
    first, rest = training.steps(run, weights) if run.steps else (0, 0)
    fall = Cosine(1.0, training.end, 1.0)
    module = PINNModule(
        net,
        run.pde,
        derivatives,
        optimizer=lambda params: training.optimizer(params, run),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: fall.value_at(step / first)),
    )
    data = PDEDataModule(
        run.pde, run.points, steps_per_epoch=max(1, first), val_points=0, test_points=run.test_points, seed=seed
    )
    callbacks = training.callbacks()
    trainer = pl.Trainer(**QUIET, max_steps=first + rest, callbacks=callbacks)
    start = time.perf_counter()
    if first:
        trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    (result,) = pl.Trainer(**QUIET).test(module, datamodule=data, verbose=False)
    asked = [source.queries for source in callbacks if isinstance(source, ZerothOrderGradient)]
    return {
        "rel_l2": result["test/rel_l2"],
        "rel_l2_smoothed": result["test/rel_l2_smoothed"],
        "residual": result["test/loss"],
        "points_per_point": derivatives.points_per_point(run.pde.num_coordinates),
        "parameters": weights,
        "steps": first + rest,
        "losses": asked[0] if asked else first,
        "seconds": seconds if first + rest else None,
    }


#: scenario, run and seed of a row
Key = tuple[str, str, int]


def rows(
    seeds: tuple[int, ...] = (1, 2),
    chosen: dict[tuple[str, str], Run] | None = None,
    done: Collection[Key] = (),
) -> Iterator[dict[str, Any]]:
    """One dict a run, training and seed that is not done: ``run``, ``seed``, ``scenario`` and what was measured."""
    for (scenario, name), run in (runs() if chosen is None else chosen).items():
        for label in run.trainings:
            shown = name if run.steps == 0 else f"{name}, {label}"
            for seed in seeds:
                if (scenario, shown, seed) not in done:
                    found = measured(run, TRAININGS[label], seed)
                    yield {"run": shown, "seed": seed, "scenario": scenario, **found}


def image_rows(
    seeds: tuple[int, ...] = (1, 2), losses: int = 20_000, done: Collection[Key] = (), **settings: Any
) -> Iterator[dict[str, Any]]:
    """The same for the runs on images."""
    for name, run in image_runs(losses).items():
        for seed in seeds:
            if (SCENARIO, name, seed) not in done:
                found = measured_images(run, seed, **settings)
                yield {"run": name, "seed": seed, "scenario": SCENARIO, **found}


def smoke() -> dict[tuple[str, str], Run]:
    """Every run, of two steps or a few losses."""
    return {
        key: replace(run, steps=min(run.steps, 2), points=2, test_points=3, losses=1000 if run.pde.dim < 20 else 40)
        for key, run in runs().items()
        if not (key[0].startswith("HJB") and key[1].startswith("dense"))
    }


def write(found: list[dict[str, Any]], path: Path) -> Path:
    """Write the rows as a result."""
    result = TableResult.measured_here(
        "tensor-bp-free",
        experiment="Fashion-MNIST: 784-256-10, batches of 100; a sine network of 3 layers of 32, 64 points a step, on"
        " equations whose lifted solution is no constant; the 20-dimensional HJB equation, 512 wide, 16 points a step."
        " Losses asked: forward passes of a step's batch",
        columns=COLUMNS,
        rows=[
            TableRow(
                row["run"],
                row["seed"],
                row["scenario"],
                {name: float(row[name]) if row.get(name) is not None else None for name in COLUMNS},
            )
            for row in found
        ],
    )
    return result.write(path)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few steps, one seed: to see that it runs")
    parser.add_argument("--scenarios", nargs="+", help="words of the scenarios to run; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", help="file of rows (JSON lines) that were measured already; others are added to it")
    parser.add_argument("--output", default="benchmarks/results/zeroth_order/tensor_bp_free.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def wanted(scenario: str) -> bool:
        return arguments.scenarios is None or any(word in scenario for word in arguments.scenarios)

    chosen = {key: run for key, run in (smoke() if arguments.smoke else runs()).items() if wanted(key[0])}
    seeds = (1,) if arguments.smoke else tuple(arguments.seeds)
    tiny = {"losses": 700, "train_rows": 200, "test_rows": 100} if arguments.smoke else {}
    kept = Path(arguments.rows) if arguments.rows else None
    found = [json.loads(line) for line in kept.read_text().splitlines()] if kept is not None and kept.is_file() else []
    done = {(row["scenario"], row["run"], row["seed"]) for row in found}
    images = image_rows(seeds, done=done, **tiny) if wanted(SCENARIO) else iter(())
    for row in chain(images, rows(seeds, chosen, done)):
        line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        print(line, flush=True)
        found.append(row)
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    if not arguments.smoke:
        write(found, Path(arguments.output))


if __name__ == "__main__":
    main()
