"""What the small experiments of adversarial robustness measured: written by benchmarks, read by the tables of the docs.

The format is written down in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.stored import StoredResult
from lightning_trust.core.robustness_record import RobustnessRecord


@dataclass(frozen=True)
class RobustnessRow:
    """One evaluated network: accuracies in [0, 1] with their 95 % intervals, and what an epoch of training took."""

    run: str
    seed: int
    samples: int
    accuracy: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]
    epoch_seconds: float | None = None

    def __post_init__(self) -> None:
        if set(self.accuracy) != set(self.intervals) or not {"clean", "union"} <= set(self.accuracy):
            raise ValueError(f"Expected accuracies and intervals of clean, each attack and union in '{self.run}'.")
        for name, (low, high) in self.intervals.items():
            if not 0.0 <= low <= self.accuracy[name] <= high <= 1.0:
                raise ValueError(f"Expected the interval of '{name}' in '{self.run}' to hold its accuracy.")

    @classmethod
    def of(cls, record: RobustnessRecord, run: str, seed: int, epoch_seconds: float | None = None) -> RobustnessRow:
        """The row of a record."""
        return cls(
            run=run,
            seed=seed,
            samples=record.samples,
            accuracy={name: each["value"] for name, each in record.accuracy.items()},
            intervals={name: [each["low"], each["high"]] for name, each in record.accuracy.items()},
            epoch_seconds=epoch_seconds,
        )


@dataclass(frozen=True)
class RobustnessResult(StoredResult):
    """One experiment of robustness: its networks, and on what they ran."""

    kind = "lightning_trust.robustness_result"
    row = RobustnessRow
