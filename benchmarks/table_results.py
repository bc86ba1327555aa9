"""Results of small experiments as rows of named figures: written by benchmarks, read by the tables of the docs.

The format is written down in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_trust.core.files import read_json, write_json

KIND = "lightning_trust.table_result"
VERSION = 1
Unit = Literal["percent", "points", "seconds", "ratio", "number"]


@dataclass(frozen=True)
class Column:
    """A figure: its head in tables, its unit (``percent`` and ``points`` hold shares), and whether it is shown."""

    head: str
    unit: Unit = "percent"

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"Expected argument `unit` to be one of {list(get_args(Unit))}, but got {self.unit!r}.")


@dataclass(frozen=True)
class TableRow:
    """One run of one seed; ``None`` where something was not measured."""

    run: str
    seed: int
    scenario: str
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class TableResult:
    """One experiment: its columns and runs, and on what they ran."""

    method: str
    experiment: str
    config: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    seeds: Sequence[int]
    columns: Mapping[str, Column]
    rows: Sequence[TableRow]

    def __post_init__(self) -> None:
        if not self.rows or not self.columns:
            raise ValueError("Expected arguments `rows` and `columns` to hold something, but got nothing.")
        strange = sorted({row.seed for row in self.rows} ^ set(self.seeds))
        if strange:
            raise ValueError(f"Expected argument `seeds` to be those of the rows, but they differ in {strange}.")
        for row in self.rows:
            if set(row.values) != set(self.columns):
                raise ValueError(
                    f"Expected '{row.run}' to have the columns {list(self.columns)}, got {list(row.values)}."
                )

    def write(self, path: str | Path) -> Path:
        """Write the result, aside and renamed."""
        written: Path = write_json(path, KIND, VERSION, asdict(self))
        return written

    @classmethod
    def read(cls, path: str | Path) -> TableResult:
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
            rows = [TableRow(**row) for row in data["rows"]]
            columns = {name: Column(**column) for name, column in data["columns"].items()}
        except TypeError as error:
            raise ValueError(f"Expected {path} to have the fields of a result, but: {error}.") from error
        return cls(**{**{name: data[name] for name in names}, "rows": rows, "columns": columns})
