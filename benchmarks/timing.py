"""Side-by-side timings in one process: interleaved rounds, compared as ratios of medians."""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_trust.core.files import write_json
from lightning_trust.core.records import hardware, versions

#: One figure: what it is, its value, its bar, whether that was reached, and what it was made of.
Row = dict[str, Any]


def medians(rounds: int, warm_up: int = 2, **candidates: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each candidate, over rounds in which every one runs once, in turn.

    The order turns by one place a round, so that no candidate always follows the same other.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warm_up + rounds):
        place = round_ % len(names)
        for name in names[place:] + names[:place]:
            start = time.perf_counter()
            candidates[name]()
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def row(what: str, value: float | None, bar: float, found: dict[str, Any]) -> Row:
    """One figure with the most that it may be and what it was made of; None where it could not be measured."""
    if value is None:
        return {"what": what, "value": "not measured", "bar": bar, "reached": None, "medians": found}
    return {"what": what, "value": round(value, 4), "bar": bar, "reached": value <= bar, "medians": found}


def measure(name: str, description: str, parts: Mapping[str, Callable[[int], list[Row]]], rounds: int = 15) -> None:
    """The command line of a benchmark: measure its parts in their order, print their figures and write them.

    Args:
        name: Name of the file in benchmarks/results.
        description: What the first line of the help says.
        parts: What is measured by its name; called with the number of rounds.
        rounds: Number of rounds by default.

    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", nargs="+", default=list(parts), choices=list(parts))
    parser.add_argument("--output", default=f"benchmarks/results/{name}.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for part in arguments.only:
        start = time.perf_counter()
        for line in parts[part](arguments.rounds):
            rows.append(line)
            print(f"{line['what']}: {line['value']} (bar {line['bar']})", flush=True)
        print(f"  [{part}: {time.perf_counter() - start:.0f} s]", flush=True)
    content = {"rows": rows, "threads": torch.get_num_threads(), "hardware": hardware(), "versions": versions()}
    write_json(arguments.output, f"lightning_trust.{name}", 1, content)
