"""Attacks: their cost beside a bare loop and peers, AutoAttack's verdicts beside theirs, and how attacks rank.

    python -m benchmarks.attacks

The peers are torchattacks 3.5.1 and pyautoattack 0.2.0, which are no dependencies: a figure that needs one that is not
installed is said to be not measured. All that is compared runs in one process, on the same network and batch, in turn;
a figure of time is a ratio of medians. Results go to benchmarks/results/attacks.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.adversarial_step import memory, training_step
from benchmarks.timing import Row, medians, row
from lightning_trust.attacks import APGD, FGSM, PGD, Attack, AutoAttack, Square, ZOSignAttack
from lightning_trust.core.files import write_json
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.core.records import hardware, versions
from lightning_trust.datamodules import FashionMNIST
from lightning_trust.functional.adversarial import norm_of
from lightning_trust.nn import SmallCNN, resnet18_small

EPS, STEP = 0.1, 0.02
#: verdicts that may differ in 500 samples, and shares of the peers' time
VERDICTS = 1.0
SHARES = {"plain": 0.3, "adversarial": 0.9}


def peer(name: str) -> Any:
    """A library if it is installed, else None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# -- networks ----------------------------------------------------------------------------------------------------------
def batches(data: FashionMNIST, epochs: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Training batches with their epoch."""
    for epoch in range(epochs):
        for inputs, targets in data.train_dataloader():
            yield epoch, inputs, targets


def trained(data: FashionMNIST, epochs: int, attack: Attack | None = None, seed: int = 1) -> nn.Module:
    """A small CNN, trained on clean inputs or on those of an attack, whose radius grows over the first half."""
    torch.manual_seed(seed)
    network = SmallCNN()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for epoch, inputs, targets in batches(data, epochs):
        if attack is not None:
            eps = EPS * min(1.0, (epoch + 1) / max(1.0, epochs / 2))
            inputs = attack.replaced(eps=eps, step_size=eps / 4)(network, inputs, targets, check=False)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return network.eval()


def networks(train_rows: int, epochs: int, seed: int = 1) -> dict[str, nn.Module]:
    """The same network trained plainly and on PGD-7."""
    data = FashionMNIST(train_rows=train_rows, val_rows=1000, batch_size=128)
    data.prepare_data()
    data.setup("fit")
    attack = PGD(EPS, STEP, 7, batch_norm="batch")
    return {"plain": trained(data, epochs, seed=seed), "adversarial": trained(data, epochs, attack, seed)}


def test_samples(rows: int) -> tuple[Tensor, Tensor]:
    """The first test images and their classes."""
    data = FashionMNIST(test_rows=rows, batch_size=rows)
    data.prepare_data()
    data.setup("test")
    inputs, targets = next(iter(data.test_dataloader()))
    return inputs, targets


def right(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Which samples a network gets right."""
    with torch.no_grad():
        return network(inputs).argmax(dim=1) == targets


# -- PGD ---------------------------------------------------------------------------------------------------------------
def bare_pgd(network: nn.Module, inputs: Tensor, targets: Tensor, steps: int) -> Tensor:
    """What one would write by hand, for a network in eval mode whose parameters need no gradients."""
    low, high = (inputs - EPS).clamp(0.0, 1.0), (inputs + EPS).clamp(0.0, 1.0)
    moved = (inputs + torch.empty_like(inputs).uniform_(-EPS, EPS)).clamp(0.0, 1.0)
    for _ in range(steps):
        moved.requires_grad_()
        loss = F.cross_entropy(network(moved), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = torch.clamp(moved.detach() + STEP * gradient.sign(), low, high)
    return moved


def pgd(
    rounds: int, rows: int | None = None, steps: int = 10, made: dict[str, Callable[[], nn.Module]] | None = None
) -> list[Row]:
    """PGD inside training, from a network in train mode whose parameters want gradients, beside a loop and a peer."""
    made = made or {"SmallCNN": SmallCNN, "ResNet-18": lambda: resnet18_small(1, 10)}
    attack = PGD(EPS, STEP, steps)
    library = peer("torchattacks")
    result: list[Row] = []
    for name, make in made.items():
        torch.manual_seed(1)
        network = make().train()
        # a call on ResNet-18 takes seconds
        count = rows or (16 if name == "ResNet-18" else 128)
        inputs, targets = torch.rand(count, 1, 28, 28), torch.randint(10, (count,))
        bare = copy.deepcopy(network).eval().requires_grad_(False)
        candidates: dict[str, Callable[[], object]] = {
            "ours": lambda network=network, x=inputs, y=targets: attack(network, x, y, check=False),
            "bare": lambda bare=bare, x=inputs, y=targets: bare_pgd(bare, x, y, steps),
        }
        if library is not None:
            theirs = library.PGD(copy.deepcopy(network), eps=EPS, alpha=STEP, steps=steps)
            candidates["torchattacks"] = lambda theirs=theirs, x=inputs, y=targets: theirs(x, y)
        found = medians(rounds, **candidates)
        for other, words in (("bare", "a bare loop"), ("torchattacks", "torchattacks")):
            ratio = found["ours"] / found[other] if other in found else None
            result.append(row(f"PGD-{steps} in training over {words}, {name}, batch {count}", ratio, 1.03, found))
    return result


# -- AutoAttack --------------------------------------------------------------------------------------------------------
def torchattacks_auto_attack(network: nn.Module, steps: int, n_queries: int, classes: int) -> Callable[..., Tensor]:
    """That of torchattacks, whose parts take 10 steps unless they are told otherwise."""
    attack = peer("torchattacks").AutoAttack(network, eps=EPS, n_classes=classes, seed=0)
    for part in attack._autoattack.attacks:
        if hasattr(part, "steps"):
            part.steps = steps
        if hasattr(part, "n_queries"):
            part.n_queries = n_queries
    result: Callable[..., Tensor] = attack
    return result


def py_auto_attack(network: nn.Module, steps: int, n_queries: int, classes: int) -> Callable[..., Tensor]:
    """That of pyautoattack."""
    attack = peer("pyautoattack").AutoAttack(network, eps=EPS, norm="Linf", seed=0)
    for part in (attack.apgd, attack.apgd_targeted, attack.fab):
        part.n_iter = steps
        part.n_target_classes = min(9, classes - 1)
    attack.square.n_queries = n_queries

    def run(inputs: Tensor, targets: Tensor) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            found: Tensor = attack.run_standard_evaluation(inputs, targets, batch_size=len(inputs))[0]
        return found

    return run


def auto_attack(
    made: dict[str, nn.Module], samples: tuple[Tensor, Tensor], steps: int = 100, n_queries: int = 5000, rounds: int = 1
) -> list[Row]:
    """AutoAttack beside its peers, all with the same steps: verdicts that differ, and time."""
    inputs, targets = samples
    attack = AutoAttack(EPS, steps=steps, n_queries=n_queries, seed=0)
    peers = {"torchattacks": torchattacks_auto_attack, "pyautoattack": py_auto_attack}
    result: list[Row] = []
    for kind, network in made.items():
        with torch.no_grad():
            classes = network(inputs[:1]).shape[1]
        installed = {name: make for name, make in peers.items() if peer(name) is not None}
        runs: dict[str, Callable[..., Tensor]] = {
            "ours": lambda x, y, network=network: attack(network, x, y, check=False),
            **{name: make(copy.deepcopy(network), steps, n_queries, classes) for name, make in installed.items()},
        }
        held: dict[str, Tensor] = {}

        def verdicts(name: str, network: nn.Module = network, runs: Any = runs, held: Any = held) -> None:
            found = runs[name](inputs, targets)
            inside = norm_of(found - inputs, "linf") <= EPS + 1e-5
            held[name] = right(network, inputs, targets) & (right(network, found, targets) | ~inside)

        found = medians(rounds, 0, **{name: (lambda name=name: verdicts(name)) for name in runs})
        accuracies = {f"robust/{name}": verdict.float().mean().item() for name, verdict in held.items()}
        for name in peers:
            ratio = found["ours"] / found[name] if name in found else None
            unlike = (held["ours"] != held[name]).sum().item() * 500 / len(inputs) if name in held else None
            what = f"AutoAttack, {kind} network, {len(inputs)} samples"
            result.append(row(f"{what}: verdicts unlike those of {name} in 500", unlike, VERDICTS, accuracies))
            result.append(row(f"{what}: time over {name}", ratio, SHARES[kind], found))
    return result


# -- the small experiment ----------------------------------------------------------------------------------------------
class RandomCorners(Attack):
    """The worst of some corners of the ball: what chance alone does."""

    def __init__(self, eps: float, tries: int) -> None:
        super().__init__(eps)
        self.tries = tries

    def _perturb(self, problem: Any) -> Tensor:
        result = problem.inputs.clone()
        for _ in range(self.tries):
            moved = problem.clip(problem.inputs + self.eps * problem.draws.signs(*result.shape[1:]))
            won = problem.fooled(problem.outputs(moved))
            result[won] = moved[won]
        return result


def line_up(steps: int = 100, n_queries: int = 500, scale: int = 1) -> dict[str, Attack]:
    """The attacks of the small experiment; ``scale`` divides the steps of the gradient attacks."""
    return {
        "random corner": RandomCorners(EPS, 1),
        "worst of 10 random corners": RandomCorners(EPS, 10),
        "FGSM": FGSM(EPS),
        "PGD-20": PGD(EPS, STEP, max(1, 20 // scale)),
        "PGD-50 x 5": PGD(EPS, STEP, max(1, 50 // scale), restarts=5),
        "APGD-CE": APGD(EPS, steps=steps),
        "AutoAttack": AutoAttack(EPS, steps=steps, n_queries=n_queries),
        "ZO-signSGD": ZOSignAttack(EPS, steps=steps, lr=0.01, q=10),
        "Square": Square(EPS, n_queries=n_queries),
    }


def small_experiment(
    made: dict[str, nn.Module] | None = None,
    samples: tuple[Tensor, Tensor] | None = None,
    attacks: dict[str, Attack] | None = None,
    seed: int = 1,
) -> list[Row]:
    """Accuracy of a plainly and an adversarially trained network under each attack, on 500 test images.

    Returns:
        One row a network and attack, the clean accuracy first: ``network``, ``attack``, ``accuracy`` in percent,
        ``seconds``, and ``queries``, the mean over the samples, for attacks on scores.

    """
    made = made or networks(12000, 6, seed)
    inputs, targets = samples or test_samples(500)
    attacks = attacks or line_up()
    result: list[Row] = []
    for kind, network in made.items():
        clean = right(network, inputs, targets)
        rows: list[tuple[str, Tensor, float, float | None]] = [("none", clean, 0.0, None)]
        for name, attack in attacks.items():
            draws = SampleDraws(torch.arange(len(inputs)), seed).stream(name)
            start = time.perf_counter()
            found = attack(network, inputs, targets, draws=draws)
            seconds = time.perf_counter() - start
            queries = attack.queries.double().mean().item() if attack.black_box else None
            rows.append((name, clean & right(network, found, targets), seconds, queries))
        for name, held, seconds, queries in rows:
            result.append(
                {
                    "network": kind,
                    "attack": name,
                    "accuracy": round(100.0 * held.double().mean().item(), 2),
                    "seconds": round(seconds, 3),
                    "queries": None if queries is None else round(queries, 1),
                }
            )
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="of PGD")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--train-rows", type=int, default=12000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default="benchmarks/results/attacks.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    made = networks(arguments.train_rows, arguments.epochs, arguments.seed)
    samples = test_samples(arguments.samples)
    experiment = small_experiment(made, samples, seed=arguments.seed)
    for line in experiment:
        print(f"{line['network']}, {line['attack']}: {line['accuracy']} % ({line['seconds']} s)", flush=True)
    rows = []
    for measured in (memory, training_step, lambda: pgd(arguments.rounds), lambda: auto_attack(made, samples)):
        for line in measured():
            rows.append(line)
            print(f"{line['what']}: {line['value']} (bar {line['bar']})", flush=True)
    content = {
        "rows": rows,
        "experiment": {
            "rows": experiment,
            "seed": arguments.seed,
            "train_rows": arguments.train_rows,
            "epochs": arguments.epochs,
            "samples": arguments.samples,
        },
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(arguments.output, "lightning_trust.attacks", 1, content)


if __name__ == "__main__":
    main()
