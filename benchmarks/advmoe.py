"""The small experiment of AdvMoE, and what networks of experts cost.

    python -m benchmarks.advmoe [--smoke]

* Fashion-MNIST, a small CNN, linf radius 0.1, TRADES with two steps in training, as in the paper: the dense network,
  one of half the width (a pathway by itself), experts and router trained together, and AdvMoE with either objective of
  the router. All networks begin alike. In the test PGD-20 against the pathway an image takes, which holds the decision,
  and PGD-20 against pathway and router at once; robust is what withstands both.
* ResNet-18 (3x3 stem) dense, one pathway of half the width, and two experts of that width with their router, 128 images
  of 28 pixels, half of them to each expert: median seconds of interleaved rounds in one process over the dense
  network's, and multiply-adds counted.

Writes benchmarks/results/adversarial/advmoe.json: about 25 minutes on one quiet core.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks.silent_trainer import SILENT
from benchmarks.table_results import Column, TableResult, TableRow
from benchmarks.timing import medians
from lightning_trust.attacks import PGD, RoutedPGD
from lightning_trust.callbacks import AdversarialTraining, AdvMoE
from lightning_trust.core.modes import eval_mode
from lightning_trust.datamodules import FashionMNIST
from lightning_trust.metrics import ExpertUtilisation, RouterRobustness
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import (
    MoEConv2d,
    MoENetwork,
    SmallCNN,
    count_multiply_adds,
    moe_resnet18,
    moe_small_cnn,
    resnet18_small,
)

EPS, STEP_SIZE, WIDTH = 0.1, 0.06, 32
IMAGE = (1, 28, 28)
QUIET = SILENT | {"devices": 1}
COLUMNS = {
    "robust": Column("Robust accuracy"),
    "pathway": Column("Against PGD-20 on the pathway alone"),
    "clean": Column("Clean"),
    "share": Column("Images at the fuller expert"),
    "routing": Column("Decisions that PGD-20 on the router leaves"),
    "multiply_adds": Column("Million multiply-adds", "number"),
    "seconds": Column("Training", "seconds"),
    "resnet18_multiply_adds": Column("ResNet-18: million multiply-adds", "number"),
    "resnet18_time": Column("ResNet-18: time of inference, dense = 1", "ratio"),
}


@dataclass(frozen=True)
class Run:
    """One run: its network (``"dense"``, ``"thin"`` or ``"moe"``) and the router's objective, None without AdvMoE."""

    network: str
    router_objective: Any = None


RUNS: dict[str, Run] = {
    "dense, TRADES": Run("dense"),
    "half the width, TRADES": Run("thin"),
    "experts and router together, TRADES": Run("moe"),
    "AdvMoE, class_mod": Run("moe", "class_mod"),
    "AdvMoE, trades": Run("moe", "trades"),
}


def inference(rounds: int = 15, batch: int = 128) -> dict[str, dict[str, float]]:
    """Time of a forward pass over the dense network's, and multiply-adds of an image, of each kind of network."""
    torch.manual_seed(0)
    dense, moe, x = resnet18_small(1).eval(), moe_resnet18(1).eval(), torch.rand(batch, *IMAGE)
    _split_evenly(moe, x)
    with torch.no_grad():
        shares = torch.bincount(moe.route(x).argmax(dim=1), minlength=2) / batch
        assert shares.max() <= 0.5 + 1 / batch, "the border between the experts is not at the median image"
        seconds = medians(rounds, dense=lambda: dense(x), thin=lambda: moe.through(x, 0), moe=lambda: moe(x))
    costs = {name: count_multiply_adds(each, IMAGE) for name, each in (("dense", dense), ("moe", moe))}
    costs["thin"] = costs["moe"] - count_multiply_adds(moe.router, IMAGE)
    return {
        name: {"resnet18_multiply_adds": costs[name] / 1e6, "resnet18_time": seconds[name] / seconds["dense"]}
        for name in seconds
    }


@torch.no_grad()
def _split_evenly(moe: MoENetwork, x: Tensor) -> None:
    """Move the border between two experts to the median image: a router that is new sends all to one."""
    scores: Any = moe.router.scores
    difference = moe.route(x).diff(dim=1).squeeze(1).sort().values
    scores.bias[0] += difference[len(x) // 2 - 1 : len(x) // 2 + 1].mean()


def network(run: Run) -> nn.Module:
    """The network of a run."""
    if run.network == "thin":
        return SmallCNN(1, 10, widths=(WIDTH // 2,) * 4)
    if run.network == "dense":
        return SmallCNN(1, 10, widths=(WIDTH,) * 4)
    # trained together the router needs its whole gradient in every step
    moe = moe_small_cnn(widths=(WIDTH,) * 4, dispatch="group" if run.router_objective else "mask")
    for layer in moe.network.modules():
        # as SmallCNN begins: in so short a run the initial weights matter more than what is compared
        if isinstance(layer, (nn.Conv2d, MoEConv2d)):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    return moe


def measured(
    run: Run,
    seed: int,
    rows: int = 8000,
    epochs: int = 4,
    test_rows: int = 1000,
    steps: int = 2,
    batch_size: int = 128,
) -> dict[str, float]:
    """Train and test one run; a network without experts is one of one expert, to which all images go."""
    pl.seed_everything(seed, verbose=False)
    classifier = ImageClassifier(
        network(run), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    )
    data = FashionMNIST(train_rows=rows, val_rows=100, test_rows=test_rows, batch_size=batch_size)
    if run.router_objective:
        training: pl.Callback = AdvMoE(EPS, STEP_SIZE, steps, router_objective=run.router_objective)
    else:
        training = AdversarialTraining(PGD(EPS, STEP_SIZE, steps), objective="trades")
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, limit_val_batches=0, callbacks=[training])
    start = time.perf_counter()
    trainer.fit(classifier, datamodule=data)
    seconds = time.perf_counter() - start
    net = classifier.network
    if isinstance(net, MoENetwork):
        net.dispatch = "group"
    return {**tested(net, data), "multiply_adds": count_multiply_adds(net, IMAGE) / 1e6, "seconds": seconds}


def tested(net: nn.Module, data: FashionMNIST) -> dict[str, float]:
    """Accuracies on the test rows, and how the experts are used: a network without any is one expert."""
    data.setup("test")
    attack, routed = PGD(eps=EPS, steps=20), RoutedPGD(eps=EPS, steps=20)
    utilisation, robustness = ExpertUtilisation(2, 10), RouterRobustness()
    clean, pathway, both = [], [], []
    with eval_mode(net), torch.no_grad():
        for x, y in data.test_dataloader():
            clean.append(net(x).argmax(dim=1) == y)
            pathway.append(clean[-1] & (net(attack(net, x, y)).argmax(dim=1) == y))
            both.append(pathway[-1])
            if isinstance(net, MoENetwork):
                scores = net.route(x)
                decision = scores.argmax(dim=1)
                utilisation.update(scores, y)
                robustness.update(scores, net.route(attack(net.route, x, decision)))
                both[-1] = pathway[-1] & (net(routed(net, x, y)).argmax(dim=1) == y)
    parts = {"robust": both, "pathway": pathway, "clean": clean}
    shares = {name: torch.cat(found).float().mean().item() for name, found in parts.items()}
    if not isinstance(net, MoENetwork):
        return {**shares, "share": 1.0, "routing": 1.0}
    return {**shares, "share": float(utilisation.compute()["share"].max()), "routing": float(robustness.compute())}


def row(name: str, seed: int, costs: Mapping[str, Mapping[str, float]], **settings: int) -> TableRow:
    """One run of one seed, with what its kind of ResNet-18 costs."""
    run = RUNS[name]
    found: dict[str, float | None] = {**measured(run, seed, **settings), **costs[run.network]}
    return TableRow(name, seed, "linf 0.1", {column: found[column] for column in COLUMNS})


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2, help=f"of size {STEP_SIZE}, of the attack in training")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing of inference")
    parser.add_argument("--output", default="benchmarks/results/adversarial/advmoe.json")
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch, one seed: to see that it runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        smoke = {"seeds": [1], "rows": 64, "epochs": 1, "test_rows": 20, "rounds": 2}
        vars(arguments).update(smoke)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    costs = inference(arguments.rounds)
    print(costs, flush=True)
    settings = {name: getattr(arguments, name) for name in ("rows", "epochs", "test_rows", "steps")}
    found = []
    for seed in arguments.seeds:
        for name in RUNS:
            found.append(row(name, seed, costs, **settings))
            print(f"  seed {seed}, {name}: {dict(found[-1].values)}", flush=True)
    TableResult.measured_here(
        "advmoe",
        experiment=f"Fashion-MNIST, {arguments.rows:,} rows, a small CNN of four layers of {WIDTH} channels, experts of"
        f" {WIDTH // 2}, {arguments.epochs} epochs, {arguments.steps} steps of linf eps {EPS};"
        f" {arguments.test_rows:,} test rows",
        columns=COLUMNS,
        rows=found,
    ).write(Path(arguments.output))


if __name__ == "__main__":
    main()
