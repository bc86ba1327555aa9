"""What zeroth-order steps cost beside the passes that they are made of.

    python -m benchmarks.zeroth_order [--rounds 15]

All that is compared runs in one process, on the same network and batch, in turn; a figure of time is a ratio of
medians. Memory is the largest sum of live storage that torch's profiler saw allocated on the CPU from the start of the work:
weights, which are there before, do not count. Results go to benchmarks/results/zeroth_order.json.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.overhead import peak_bytes, row
from benchmarks.timing import medians
from lightning_trust.core.files import write_json
from lightning_trust.core.records import hardware, versions
from lightning_trust.optim import MeZO

Row = dict[str, Any]


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


#: what is measured, in this order
MEASURED: dict[str, Callable[[int], list[Row]]] = {"mezo": mezo_step}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--output", default="benchmarks/results/zeroth_order.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for name in arguments.only:
        for line in MEASURED[name](arguments.rounds):
            rows.append(line)
            print(f"{line['what']}: {line['value']} (bar {line['bar']})", flush=True)
    content = {"rows": rows, "threads": torch.get_num_threads(), "hardware": hardware(), "versions": versions()}
    write_json(arguments.output, "lightning_trust.zeroth_order", 1, content)


if __name__ == "__main__":
    main()
