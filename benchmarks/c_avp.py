"""The small experiment of class-wise adversarial prompting: a network that was trained naturally gets frames.

    python -m benchmarks.c_avp [--smoke] [--seeds 1 2 3]

A small CNN is trained on Fashion-MNIST as usual, and frozen. Frames of six pixels are trained on 5,000 images in 3
epochs: one for all classes on clean images (VP), on adversarial ones as well (U-AVP), one a class without the
interrelations (C-AVP-v0) and with them (C-AVP). Every defence is attacked by PGD of 20 steps that does not know of it,
as in the paper, and by one that does: through the defence, on cross-entropy and on the margin, and with what was made
for the bare network. Writes benchmarks/results/prompting/c_avp.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks.prompting_tasks import QUIET
from benchmarks.table_results import Column, TableResult, TableRow
from lightning_trust.attacks import PGD
from lightning_trust.attacks.attack import LossName
from lightning_trust.callbacks import AdversarialPrompting
from lightning_trust.core.wrapping import Surrounded
from lightning_trust.datamodules import FashionMNIST
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import AntiAdversary, ClassWisePrompt, SmallCNN

EPS = 0.05
CRAFT = PGD(eps=EPS, step_size=EPS / 4, steps=5)
ATTACK = PGD(eps=EPS, step_size=EPS / 8, steps=20)
#: name in the table -> number of prompts, whether attacks are trained on, weight of the interrelations
DEFENCES: dict[str, tuple[int, bool, float]] = {
    "VP, one prompt": (1, False, 0.0),
    "U-AVP, one prompt": (1, True, 3.0),
    "C-AVP-v0, a prompt a class": (10, True, 0.0),
    "C-AVP, a prompt a class": (10, True, 3.0),
}
SIZES = {"base_rows": 12_000, "base_epochs": 10, "rows": 5_000, "epochs": 3, "test_rows": 1_000}
SMOKE = {"base_rows": 200, "base_epochs": 1, "rows": 64, "epochs": 1, "test_rows": 20}
#: what an attack that knows the defence maximises, one after the other
LOSSES: tuple[LossName, ...] = ("ce", "margin")


def base(seed: int, folder: Path, sizes: dict[str, int]) -> SmallCNN:
    """The network, trained naturally; the same file is read the next time."""
    path = folder / f"garments-{sizes['base_rows']}-{seed}.pt"
    network = SmallCNN()
    if not path.is_file():
        pl.seed_everything(seed, verbose=False)
        network = SmallCNN()
        data = FashionMNIST(train_rows=sizes["base_rows"], val_rows=0, seed=seed)
        pl.Trainer(**QUIET, max_epochs=sizes["base_epochs"]).fit(ImageClassifier(network), data)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


@torch.no_grad()
def right(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images are classified rightly."""
    return torch.cat([network(some).argmax(dim=1) for some in x.split(100)]) == y


def share(flags: Tensor) -> float:
    """Share of images."""
    return float(flags.double().mean())


def attacked(network: nn.Module, x: Tensor, y: Tensor, seed: int, loss: LossName = "ce") -> Tensor:
    """Adversarial images for a network."""
    torch.manual_seed(seed)
    attack = ATTACK.replaced(loss=loss)
    parts = zip(x.split(100), y.split(100), strict=True)
    return torch.cat([attack(network, images, classes) for images, classes in parts])


def evaluated(defence: nn.Module, blind: Tensor, x: Tensor, y: Tensor, seed: int) -> dict[str, float]:
    """Accuracy on clean images, on those that were made for the bare network, and on the worst that is known.

    A prompt may make a network so sure of itself that its cross-entropy has no gradient, so an attack that knows the
    defence tries its margin as well, and what was made for the bare network.
    """
    start = time.perf_counter()
    clean = right(defence, x, y)
    seconds = time.perf_counter() - start
    transfer = right(defence, blind, y)
    withstood = transfer & clean
    for loss in LOSSES:
        withstood &= right(defence, attacked(defence, x, y, seed, loss), y)
    return {
        "clean": share(clean),
        "transfer": share(transfer),
        "adaptive": share(withstood),
        "ms": 1000.0 * seconds / len(x),
    }


def trained(network: SmallCNN, name: str, seed: int, sizes: dict[str, int], lr: float) -> ClassWisePrompt:
    """The prompts of a defence."""
    count, adversarial, beta = DEFENCES[name]
    pl.seed_everything(seed, verbose=False)
    prompt = ClassWisePrompt(count, image_size=28, channels=1, size=6)
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    callback = AdversarialPrompting(prompt, CRAFT if adversarial else None, beta=beta, optimizer=optimizer, seed=seed)
    data = FashionMNIST(train_rows=sizes["rows"], val_rows=0, seed=seed)
    pl.Trainer(**QUIET, max_epochs=sizes["epochs"], callbacks=[callback]).fit(ImageClassifier(network), data)
    return prompt


def rows_of(
    seeds: Sequence[int], folder: Path, sizes: dict[str, int], lr: float, names: Sequence[str] = tuple(DEFENCES)
) -> Iterator[dict[str, Any]]:
    """One dict a defence and seed."""
    for seed in seeds:
        network = base(seed, folder, sizes)
        data = FashionMNIST(test_rows=sizes["test_rows"], seed=seed)
        data.setup()
        x, y = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
        blind = attacked(network, x, y, seed)
        yield {"run": "no prompt", "seed": seed, **evaluated(network, blind, x, y, seed)}
        for name in names:
            prompt = trained(network, name, seed, sizes, lr)
            row = evaluated(Surrounded(network, prompt), blind, x, y, seed)
            if prompt.num_prompts > 1:
                # told the class: each image under the prompt of its own
                with torch.no_grad():
                    own = prompt.images(x)[torch.arange(len(x)), y]
                row["told"] = share(right(network, own, y))
            yield {"run": name, "seed": seed, **row}
        yield {"run": "Anti-adversary", "seed": seed, **evaluated(AntiAdversary(network), blind, x, y, seed)}


def result(found: Sequence[dict[str, Any]]) -> TableResult:
    """The rows as a result."""
    columns = {
        "clean": Column("Clean accuracy"),
        "transfer": Column("Under PGD-20, blind"),
        "adaptive": Column("Under PGD-20, adaptive"),
        "told": Column("Under the prompt of the true class"),
        "ms": Column("Milliseconds an image", "number"),
    }
    return TableResult.measured_here(
        "c-avp",
        experiment="Fashion-MNIST, a CNN of 33,338 weights trained naturally, frozen; frames of 6 pixels, 5,000 images,"
        " 3 epochs, PGD-5 with eps 0.05; 1,000 test images",
        columns=columns,
        rows=[
            TableRow(row["run"], row["seed"], "Fashion-MNIST", {name: row.get(name) for name in columns})
            for row in found
        ],
    )


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, one seed: to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--folder", default="runs/prompting/sources", help="where trained networks lie")
    parser.add_argument("--output", default="benchmarks/results/prompting/c_avp.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = []
    sizes = SMOKE if arguments.smoke else SIZES
    for row in rows_of([1] if arguments.smoke else arguments.seeds, Path(arguments.folder), sizes, arguments.lr):
        print(json.dumps(row), flush=True)
        found.append(row)
    made = result(found)
    if not arguments.smoke:
        made.write(Path(arguments.output))


if __name__ == "__main__":
    main()
