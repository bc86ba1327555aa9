"""Networks of experts: time and cost of inference, and the small experiment of adversarial training.

    python -m benchmarks.advmoe [--smoke]

* :func:`inference`: ResNet-18 (3x3 stem) dense and as two experts of half the width, router included, for images of 28
  pixels: median seconds of interleaved rounds in one process, their ratio, and multiply-adds counted;
* :func:`rows`: Fashion-MNIST, a small CNN, linf radius 0.1, TRADES with five steps in training and PGD-20 in the test:
  the dense network, one of half the width (what a pathway costs), experts and router trained together, and AdvMoE with
  either objective of the router.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks.timing import medians
from lightning_trust.attacks import PGD
from lightning_trust.callbacks import AdversarialTraining, AdvMoE, RobustEvaluation
from lightning_trust.core.modes import eval_mode
from lightning_trust.datamodules import FashionMNIST
from lightning_trust.metrics import ExpertUtilisation, RouterRobustness
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import (
    MoEConv2d,
    MoENetwork,
    Router,
    SmallCNN,
    convert_to_moe,
    count_multiply_adds,
    moe_resnet18,
    resnet18_small,
)

EPS, STEP_SIZE, STEPS, WIDTH = 0.1, 0.04, 5, 32
IMAGE = (1, 28, 28)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Run:
    """One run: its network (``"dense"``, ``"thin"`` or ``"moe"``) and the router's objective, None without AdvMoE."""

    network: str
    router_objective: Any = None


RUNS: dict[str, Run] = {
    "dense": Run("dense"),
    "thin": Run("thin"),
    "joint": Run("moe"),
    "advmoe_trades": Run("moe", "trades"),
    "advmoe_class_mod": Run("moe", "class_mod"),
}


def inference(rounds: int = 15, batch: int = 128, ratio: float = 0.5) -> dict[str, Any]:
    """Time of a forward pass of the dense network and of the experts, and multiply-adds of an image."""
    torch.manual_seed(0)
    dense, moe, x = resnet18_small(1).eval(), moe_resnet18(1, ratio=ratio).eval(), torch.rand(batch, *IMAGE)
    _split_evenly(moe, x)
    with torch.no_grad():
        shares = torch.bincount(moe.route(x).argmax(dim=1), minlength=2) / batch
        seconds = medians(rounds, dense=lambda: dense(x), moe=lambda: moe(x), router=lambda: moe.route(x))
    costs = {name: count_multiply_adds(each, IMAGE) for name, each in (("dense", dense), ("moe", moe))}
    return {
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "time_ratio": seconds["moe"] / seconds["dense"],
        **{f"multiply_adds_{name}": value for name, value in costs.items()},
        "multiply_adds_ratio": costs["moe"] / costs["dense"],
        "expert_shares": shares.tolist(),
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
    dense = SmallCNN(1, 10, widths=(WIDTH,) * 4)
    if run.network == "dense":
        return dense
    router = Router(2, 1, widths=(8, 16), blocks=(1, 1))
    # the joint run needs the router's whole gradient in every step
    moe = convert_to_moe(dense, ratio=0.5, router=router, dispatch="group" if run.router_objective else "mask")
    for layer in moe.network.modules():
        # as SmallCNN begins: in so short a run the initial weights matter more than what is compared
        if isinstance(layer, (nn.Conv2d, MoEConv2d)):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    return moe


def measured(
    run: Run, seed: int, epochs: int = 4, train_rows: int = 10000, test_rows: int = 1000, batch_size: int = 128
) -> dict[str, Any]:
    """Train and test one run: accuracies in [0, 1], seconds of the fit, multiply-adds; of experts how they are used."""
    pl.seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
    classifier = ImageClassifier(network(run), optimizer=optimizer)
    data = FashionMNIST(train_rows=train_rows, val_rows=100, test_rows=test_rows, batch_size=batch_size)
    if run.router_objective:
        arguments = {"eps": EPS, "step_size": STEP_SIZE, "steps": STEPS, "router_lr": 0.05}
        training: pl.Callback = AdvMoE(router_objective=run.router_objective, **arguments)
    else:
        training = AdversarialTraining(PGD(eps=EPS, step_size=STEP_SIZE, steps=STEPS), objective="trades")
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, limit_val_batches=0, callbacks=[training])
    start = time.perf_counter()
    trainer.fit(classifier, datamodule=data)
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as folder:
        evaluation = RobustEvaluation({"pgd": PGD(eps=EPS, steps=20)}, folder=folder)
        tester = pl.Trainer(**QUIET, callbacks=[evaluation], default_root_dir=folder)
        (result,) = tester.test(classifier, datamodule=data, verbose=False)
    found["clean_acc"], found["robust_acc"] = result["trust/clean_acc"], result["trust/robust_acc/pgd"]
    moe = classifier.network
    if isinstance(moe, MoENetwork):
        moe.dispatch = "group"
        found.update(_routing(moe, data))
    return {**found, "multiply_adds": count_multiply_adds(moe, IMAGE)}


def _routing(moe: MoENetwork, data: pl.LightningDataModule) -> dict[str, float]:
    utilisation, robustness = ExpertUtilisation(2, 10), RouterRobustness()
    right, count = torch.zeros(2), 0
    attack = PGD(eps=EPS, steps=10)
    with eval_mode(moe), torch.no_grad():
        for x, y in data.test_dataloader():
            scores = moe.route(x)
            moved = attack(moe.route, x, scores.argmax(dim=1))
            utilisation.update(scores, y)
            robustness.update(scores, moe.route(moved))
            right += torch.stack([(moe.through(x, expert).argmax(dim=1) == y).sum() for expert in range(2)])
            count += len(y)
    accuracies = (right / count).tolist()
    return {
        **{f"share_{expert}": float(share) for expert, share in enumerate(utilisation.compute()["share"])},
        "entropy": float(utilisation.compute()["entropy"]),
        "router_robustness": float(robustness.compute()),
        **{f"clean_acc_through_{expert}": value for expert, value in enumerate(accuracies)},
    }


def rows(seeds: tuple[int, ...] = (1, 2, 3), **settings: Any) -> Iterator[dict[str, Any]]:
    """One dict a run and seed: ``run``, ``seed`` and what :func:`measured` gives."""
    for seed in seeds:
        for name, run in RUNS.items():
            yield {"run": name, "seed": seed, **measured(run, seed, **settings)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one epoch, one seed: to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    small: dict[str, Any] = {"epochs": 1, "train_rows": 64, "test_rows": 20, "batch_size": 32}
    print(json.dumps(inference(rounds=2, batch=4) if arguments.smoke else inference()))
    for row in rows((1,), **small) if arguments.smoke else rows(tuple(arguments.seeds)):
        print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}))


if __name__ == "__main__":
    main()
