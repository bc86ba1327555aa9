"""Values that change over a run, as plain dataclasses."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


class Schedule(ABC):
    """A value that depends on how many epochs have gone by, fractions included."""

    @abstractmethod
    def value_at(self, epochs: float) -> float:
        """The value after so many epochs."""


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    """From one value to another along a line, and then constant.

    Args:
        start: Value at the beginning.
        end: Value from ``epochs`` on.
        epochs: How long it takes, in epochs; positive.

    Raises:
        ValueError: If ``epochs`` is not positive.

    Example:
        >>> [LinearWarmup(0.0, 0.1, epochs=5).value_at(epoch) for epoch in (0, 2.5, 7)]
        [0.0, 0.05, 0.1]

    """

    start: float
    end: float
    epochs: float

    def __post_init__(self) -> None:
        if not self.epochs > 0:
            raise ValueError(f"Expected argument `epochs` to be positive, but got {self.epochs}.")

    def value_at(self, epochs: float) -> float:
        """The value after so many epochs."""
        return self.start + (self.end - self.start) * min(1.0, max(0.0, epochs / self.epochs))


@dataclass(frozen=True)
class Steps(Schedule):
    """Constant pieces.

    Args:
        values: The values, one more than milestones.
        milestones: Epochs at which the next value begins, ascending.

    Raises:
        ValueError: If the numbers do not fit, or the milestones do not ascend.

    Example:
        >>> Steps([0.1, 0.01], milestones=[3]).value_at(3.0)
        0.01

    """

    values: Sequence[float]
    milestones: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(
                f"Expected argument `values` to have one value more than there are milestones, but got"
                f" {len(self.values)} and {len(self.milestones)}."
            )
        if any(second <= first for first, second in itertools.pairwise(self.milestones)):
            raise ValueError(f"Expected argument `milestones` to ascend, but got {list(self.milestones)}.")

    def value_at(self, epochs: float) -> float:
        """The value after so many epochs."""
        return self.values[sum(epochs >= milestone for milestone in self.milestones)]


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""From one value to another along half a cosine, and then constant.

    .. math:: v(t) = b + \frac{a - b}{2} \Big(1 + \cos\frac{\pi t}{T}\Big)

    Args:
        start: Value :math:`a` at the beginning.
        end: Value :math:`b` from ``epochs`` on.
        epochs: How long :math:`T` it takes, in epochs; positive.

    Raises:
        ValueError: If ``epochs`` is not positive.

    Example:
        >>> [round(Cosine(1.0, 0.0, epochs=10).value_at(epoch), 3) for epoch in (0, 5, 10, 12)]
        [1.0, 0.5, 0.0, 0.0]

    """

    start: float
    end: float
    epochs: float

    def __post_init__(self) -> None:
        if not self.epochs > 0:
            raise ValueError(f"Expected argument `epochs` to be positive, but got {self.epochs}.")

    def value_at(self, epochs: float) -> float:
        """The value after so many epochs."""
        share = min(1.0, max(0.0, epochs / self.epochs))
        return self.end + (self.start - self.end) / 2.0 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Product(Schedule):
    """The product of other schedules, such as a warm-up and the steps after it.

    Args:
        schedules: The factors, at least one.

    Raises:
        ValueError: If there are none.

    Example:
        >>> rate = Product([LinearWarmup(0.0, 1.0, epochs=5), Steps([1.0, 0.1], milestones=[25])])
        >>> [rate.value_at(epoch) for epoch in (1, 5, 25)]
        [0.2, 1.0, 0.1]

    """

    schedules: Sequence[Schedule]

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ValueError("Expected argument `schedules` to hold at least one schedule, but got none.")

    def value_at(self, epochs: float) -> float:
        """The value after so many epochs."""
        return math.prod(schedule.value_at(epochs) for schedule in self.schedules)
