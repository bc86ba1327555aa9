"""What zeroth-order steps cost beside the passes that they are made of.

    python -m benchmarks.zeroth_order [--rounds 15]

All that is compared runs in one process, on the same network and batch, in turn; a figure of time is a ratio of
medians. Memory is the largest sum of live storage that torch's profiler saw allocated on the CPU from the start of the
work: weights, which are there before, do not count. Results go to benchmarks/results/zeroth_order.json.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)

import lightning.pytorch as pl  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from benchmarks.overhead import peak_bytes  # noqa: E402
from benchmarks.silent_trainer import SILENT  # noqa: E402
from benchmarks.timing import Row, measure, medians, row  # noqa: E402
from lightning_trust.callbacks import ZerothOrderGradient  # noqa: E402
from lightning_trust.modules import ImageClassifier  # noqa: E402
from lightning_trust.nn import MLP  # noqa: E402
from lightning_trust.optim import CGE, LossOracle, MeZO  # noqa: E402
from lightning_trust.optim.zeroth_order.oracle import Parallel  # noqa: E402


# -- MeZO --------------------------------------------------------------------------------------------------------------
def deep_network(width: int, depth: int) -> nn.Module:
    """A perceptron that is nearly all weights, none of them much larger than the others."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def mezo_step(rounds: int = 15, width: int = 1024, depth: int = 10, batch_size: int = 256) -> list[Row]:
    """A step of MeZO over its two forward passes and three passes over the weights; its memory over one forward pass.

    A pass over the weights draws a normal number for each and adds it.
    """
    torch.manual_seed(0)
    network = deep_network(width, depth)
    parameters = list(network.parameters())
    inputs, targets = torch.randn(batch_size, width), torch.arange(batch_size) % 10
    optimizer = MeZO(network.named_parameters(), lr=1e-7)

    @torch.no_grad()
    def forward() -> Tensor:
        return F.cross_entropy(network(inputs), targets)

    largest = max(parameters, key=torch.numel)
    buffer, generator = torch.empty_like(largest).flatten(), torch.Generator()

    @torch.no_grad()
    def draw_and_add() -> None:
        generator.manual_seed(0)
        for parameter in parameters:
            drawn = buffer[: parameter.numel()].view(parameter.shape).normal_(generator=generator)
            parameter.add_(drawn, alpha=1e-9)

    def parts() -> None:
        for _ in range(2):
            forward()
        for _ in range(3):
            draw_and_add()

    # the first step sees that the loss is the same twice
    optimizer.step(forward)
    found = medians(rounds, mezo=lambda: optimizer.step(forward), parts=parts, forward=forward, draw=draw_and_add)
    count = sum(parameter.numel() for parameter in parameters)
    what = f"MeZO step, {count:,} parameters, batch {batch_size}"
    time = found["mezo"] / found["parts"]
    memory = {
        "mezo": peak_bytes(lambda: optimizer.step(forward)),
        "forward": peak_bytes(forward),
        "largest": largest.numel() * largest.element_size(),
    }
    ratio = memory["mezo"] / (memory["forward"] + memory["largest"])
    return [
        row(f"{what}: time over two forward passes and three over the weights", time, 1.10, found),
        row(f"{what}: peak memory over a forward pass and one largest tensor", ratio, 1.10, memory),
    ]


# -- coordinates -------------------------------------------------------------------------------------------------------
def digits_mlp() -> tuple[nn.Module, Tensor]:
    """1,210 parameters, and images of the size of the digits."""
    return MLP(image_size=8), torch.rand(256, 1, 8, 8)


def two_convolutions() -> tuple[nn.Module, Tensor]:
    """Two convolutions with 2,698 parameters in all, and images of 14 pixels."""
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    )
    return network, torch.rand(256, 1, 14, 14)


NETWORKS = {"digits MLP": (digits_mlp, 30.0), "two convolutions": (two_convolutions, 10.0)}


def gradient(estimator: CGE, network: nn.Module, images: Tensor) -> Tensor:
    """The estimate of a whole network as one vector."""
    targets = torch.arange(len(images)) % 10
    network.zero_grad(set_to_none=False)
    estimator.estimate(
        lambda: F.cross_entropy(network(images), targets), dict(network.named_parameters()), module=network
    )
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def coordinates(rounds: int = 5) -> list[Row]:
    """All coordinates over one at a time without reuse: times faster, in a loop and in a Trainer, and how equal."""
    rows = []
    # one at a time takes seconds
    few = max(2, rounds // 3)
    one, every = CGE(feature_reuse=False, chunk=1), CGE()
    for name, (make, bar) in NETWORKS.items():
        torch.manual_seed(0)
        network, images = make()
        what = f"CGE, {name}, {sum(parameter.numel() for parameter in network.parameters()):,} parameters, batch 256"
        loop = medians(
            few, 1, one=partial(gradient, one, network, images), all=partial(gradient, every, network, images)
        )
        speed = loop["one"] / loop["all"]
        rows.append(at_least(f"{what}: times faster than one coordinate at a time", speed, bar, loop))
        steps = steps_of_trainer(few, network, images, one=one, all=every)
        speed = steps["one"] / steps["all"]
        rows.append(at_least(f"{what}: the same for a step of a Trainer", speed, bar, steps))
        wide, images = network.double(), images.double()
        gap = float((gradient(one, wide, images) - gradient(every, wide, images)).abs().max())
        rows.append(
            {**row(f"{what}: largest difference of the two in float64", gap, 1e-10, {"gap": gap}), "value": gap}
        )
    return rows


def steps_of_trainer(rounds: int, network: nn.Module, images: Tensor, **estimators: CGE) -> dict[str, float]:
    """Median seconds of a training step under ``ZerothOrderGradient``, in turn; set-up is left out."""
    targets = torch.arange(len(images)) % 10
    loader = DataLoader(TensorDataset(images, targets), batch_size=len(images))
    seconds: dict[str, list[float]] = {name: [] for name in estimators}
    for _ in range(rounds):
        for name, estimator in estimators.items():
            clock = BatchClock()
            trainer = pl.Trainer(
                **SILENT,
                devices=1,
                max_epochs=2,
                callbacks=[clock, ZerothOrderGradient(estimator)],
            )
            trainer.fit(ImageClassifier(copy.deepcopy(network), schedule="constant"), loader)
            # the first step sees that the loss is the same twice
            seconds[name].append(clock.seconds[-1])
    return {name: statistics.median(values) for name, values in seconds.items()}


class BatchClock(pl.Callback):
    """Seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds.append(time.perf_counter() - self._start)


def at_least(what: str, value: float, bar: float, parts: dict[str, float]) -> Row:
    """A figure that is to be large."""
    return {**row(what, value, bar, parts), "reached": value >= bar, "least": True}


# -- ranks -------------------------------------------------------------------------------------------------------------
def ranks(rounds: int = 9) -> list[Row]:
    """Coordinates a second of two ranks that share them, over those of two processes that do not know of each other."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, args=(folder, rounds), nprocs=2)
        found = json.loads((Path(folder) / "found.json").read_text())
    # two processes on their own ask 2 d coordinates in their time, the ranks d in theirs
    speed = found["alone"] / (2.0 * found["shared"])
    what = f"CGE on two ranks, one thread each, {found['parameters']:,} parameters, batch 256"
    return [
        at_least(f"{what}: coordinates a second over those of two independent processes", speed, 0.85, found),
        row(f"{what}: bytes that a rank sends, of a float32 a coordinate", found["bytes"], 1.0, found),
    ]


def _rank(rank: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    network, images = two_convolutions()
    targets = torch.arange(len(images)) % 10
    parameters = dict(network.named_parameters())

    def estimate(parallel: Parallel) -> int:
        network.zero_grad(set_to_none=False)
        dist.barrier()
        oracle = LossOracle(
            lambda: F.cross_entropy(network(images), targets), parameters, network, network, parallel=parallel
        )
        if parallel == "queries":
            return CGE().add(oracle).bytes_sent
        # as one process alone: its values stay with it
        oracle.combined = lambda values, costs=None: values  # type: ignore[method-assign]
        CGE().add(oracle)
        return 0

    found = medians(rounds, shared=lambda: estimate("queries"), alone=lambda: estimate("data"))
    count = sum(parameter.numel() for parameter in parameters.values())
    found["bytes"] = estimate("queries") / (4.0 * count)
    found["parameters"] = count
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


#: what is measured, in this order
MEASURED: dict[str, Callable[[int], list[Row]]] = {"mezo": mezo_step, "coordinates": coordinates, "ranks": ranks}


def main() -> None:
    """Measure, print, write."""
    measure("zeroth_order", (__doc__ or "").splitlines()[0], MEASURED)


if __name__ == "__main__":
    main()
