"""What the small experiments of adversarial robustness measured: written by benchmarks, read by the tables of the docs.

The format is written down in benchmarks/README.md.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightning_trust.core.files import read_json, write_json
from lightning_trust.core.robustness_record import RobustnessRecord

KIND = "lightning_trust.robustness_result"
VERSION = 1


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
class RobustnessResult:
    """One experiment: its networks, and on what they ran."""

    method: str
    experiment: str
    config: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    seeds: Sequence[int]
    rows: Sequence[RobustnessRow]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("Expected argument `rows` to hold at least one run, but got none.")
        strange = sorted({row.seed for row in self.rows} ^ set(self.seeds))
        if strange:
            raise ValueError(f"Expected argument `seeds` to be those of the rows, but they differ in {strange}.")

    def write(self, path: str | Path) -> Path:
        """Write the result, aside and renamed."""
        written: Path = write_json(path, KIND, VERSION, asdict(self))
        return written

    @classmethod
    def read(cls, path: str | Path) -> RobustnessResult:
        """Read a result.

        Raises:
            ValueError: If the file is damaged or lacks a field.

        """
        data = read_json(path, KIND, VERSION)
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"Expected {path} to hold a result, but it lacks {missing}.")
        try:
            rows = [RobustnessRow(**row) for row in data["rows"]]
        except TypeError as error:
            raise ValueError(f"Expected the rows of {path} to have the fields of a result, but: {error}.") from error
        return cls(**{**{name: data[name] for name in names}, "rows": rows})


def now() -> str:
    """ISO 8601 time."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
