"""Results of small experiments as rows of named figures: written by benchmarks, read by the tables of the docs.

The format is written down in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from benchmarks.stored import StoredResult

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
class TableResult(StoredResult):
    """One experiment whose figures have names of their own."""

    kind = "lightning_trust.table_result"
    row = TableRow

    columns: Mapping[str, Column]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.columns:
            raise ValueError("Expected argument `columns` to hold at least one figure, but got none.")
        for row in self.rows:
            if set(row.values) != set(self.columns):
                raise ValueError(
                    f"Expected '{row.run}' to have the columns {list(self.columns)}, got {list(row.values)}."
                )

    @classmethod
    def parsed(cls, name: str, value: Any) -> Any:
        """A field as it stands in a file, made what it is here."""
        if name == "columns":
            return {each: Column(**column) for each, column in value.items()}
        return super().parsed(name, value)
