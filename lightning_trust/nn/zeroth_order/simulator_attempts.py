"""What is done about calls of a simulator that fail: row by row, again, and in the end an error that quotes the row."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_trust.nn.zeroth_order.simulator_calls import Array, Call, FailedCallError

Seeds = NDArray[np.int64]


class SimulatorError(RuntimeError):
    """A simulator raised, hung, or died; the message quotes the input row.

    Attributes:
        point: The input row.

    """

    def __init__(self, message: str, point: Array | None = None) -> None:
        super().__init__(message)
        self.point = point


class SimulatorAnswerError(SimulatorError, ValueError):
    """A simulator gave an answer of the wrong shape, or one that is not finite."""


@dataclass
class SimulatorCounts:
    """What a simulator has been asked, on this rank.

    Attributes:
        queries: Rows that were given to it, those asked again included.
        hits: Rows that were answered from memory.
        failures: Rows that were left without an answer.
        retries: Calls that were made again.
        seconds: Time spent waiting for it.

    """

    queries: int = 0
    hits: int = 0
    failures: int = 0
    retries: int = 0
    seconds: float = 0.0

    def __sub__(self, other: SimulatorCounts) -> SimulatorCounts:
        return SimulatorCounts(**{name: value - getattr(other, name) for name, value in asdict(self).items()})


@dataclass
class Attempts:
    """Calls a simulator on some rows until each is answered or has failed for good.

    Args:
        name: What an error calls it.
        call: How it is called.
        out_dim: Numbers in an answer.
        batched: Whether it takes many rows a call.
        retries: How many times a row is asked again.
        backoff: Seconds to wait before a row is asked again, doubled each time.
        raises: Whether a row that failed for good is an error; else its answer is NaN.
        counts: Where to count; threads may count at the same time.

    """

    name: str
    call: Call
    out_dim: int
    batched: bool
    retries: int
    backoff: float
    raises: bool
    counts: SimulatorCounts
    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, points: Array, seeds: Seeds | None) -> Array:
        """Answers ``(n, m)`` to the rows of one call; where it fails as a whole, to each row by itself."""
        try:
            values = self._once(points, seeds)
        except FailedCallError as error:
            if len(points) == 1:
                return self._again(points, seeds, error)
            return np.concatenate([self(*_row(points, seeds, row)) for row in range(len(points))])
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1)):
            values[row] = self._again(*_row(points, seeds, row), _NotFinite(values[row]))
        return values

    def _again(self, points: Array, seeds: Seeds | None, error: FailedCallError) -> Array:
        """Ask a row that failed once more, as often as is allowed."""
        for attempt in range(self.retries):
            time.sleep(self.backoff * 2**attempt)
            with self.lock:
                self.counts.retries += 1
            try:
                values = self._once(points, seeds)
            except FailedCallError as another:
                error = another
                continue
            if np.isfinite(values).all():
                return values
            error = _NotFinite(values[0])
        with self.lock:
            self.counts.failures += 1
        if not self.raises:
            return np.full((1, self.out_dim), np.nan)
        unusable = isinstance(error, _NotFinite)
        attempts = f" in {self.retries + 1} attempts" if self.retries else ""
        raise (SimulatorAnswerError if unusable else SimulatorError)(
            f"Expected {'finite numbers' if unusable else 'an answer'} from the simulator {self.name} for the input"
            f" {quoted(points[0])}, but it {error}{attempts}.",
            points[0],
        ) from error.__cause__

    def _once(self, points: Array, seeds: Seeds | None) -> Array:
        with self.lock:
            self.counts.queries += len(points)
        # copies: a simulator may work in place
        arguments: tuple[Any, ...] = (points.copy(),) if seeds is None else (points.copy(), seeds.copy())
        found = self.call(arguments if self.batched else tuple(each[0] for each in arguments))
        try:
            values = np.array(found, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise SimulatorAnswerError(
                f"Expected numbers from the simulator {self.name} for the input {quoted(points[0])}, but got"
                f" {type(found).__name__}: {error}.",
                points[0],
            ) from error
        shapes: list[tuple[int, ...]] = [(len(points), self.out_dim)] if self.batched else [(self.out_dim,)]
        if self.out_dim == 1:
            shapes.append((len(points),) if self.batched else ())
        if values.shape not in shapes:
            raise SimulatorAnswerError(
                f"Expected the simulator {self.name} to answer {len(points)} input rows, the first of which is"
                f" {quoted(points[0])}, with the shape {' or '.join(map(str, shapes))}, but got {values.shape}.",
                points[0],
            )
        return values.reshape(len(points), self.out_dim)


class _NotFinite(FailedCallError):  # noqa: N818 - not for users
    """It answered, but not with finite numbers."""

    def __init__(self, values: Array) -> None:
        super().__init__(f"answered {values.tolist()}")


def quoted(point: Array) -> str:
    """A row in an error: its first 16 numbers."""
    shown = ", ".join(repr(float(value)) for value in point[:16])
    return f"[{shown}{', ...' if len(point) > 16 else ''}]"


def _row(points: Array, seeds: Seeds | None, row: Any) -> tuple[Array, Seeds | None]:
    one = slice(row, row + 1)
    return points[one], None if seeds is None else seeds[one]
