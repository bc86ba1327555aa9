"""Side-by-side timings in one process: interleaved rounds, compared as ratios of medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


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
