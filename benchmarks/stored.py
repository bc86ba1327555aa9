"""The part that all files of results have in common: what was done, on what, with which seeds, and rows."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lightning_trust.catalog import method
from lightning_trust.core.files import read_json, write_json
from lightning_trust.core.records import hardware, versions

VERSION = 1
Stored = TypeVar("Stored", bound="StoredResult")


@dataclass(frozen=True)
class StoredResult:
    """One experiment: its runs over all seeds, and on what they ran. A subclass names its kind of file and row."""

    kind: ClassVar[str]
    row: ClassVar[type[Any]]

    method: str
    experiment: str
    config: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    seeds: Sequence[int]
    rows: Sequence[Any]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("Expected argument `rows` to hold at least one run, but got none.")
        strange = sorted({row.seed for row in self.rows} ^ set(self.seeds))
        if strange:
            raise ValueError(f"Expected argument `seeds` to be those of the rows, but they differ in {strange}.")

    @classmethod
    def measured_here(
        cls: type[Stored], method_name: str, experiment: str, rows: Sequence[Any], **fields: Any
    ) -> Stored:
        """The result of a method of the catalog, measured just now on this machine."""
        return cls(
            method=method_name,
            experiment=experiment,
            config=method(method_name).config,
            hardware=hardware(),
            versions=versions(),
            created=now(),
            seeds=sorted({row.seed for row in rows}),
            rows=rows,
            **fields,
        )

    def content(self) -> dict[str, Any]:
        """What a file holds."""
        return asdict(self)

    def write(self, path: str | Path) -> Path:
        """Write the result, aside and renamed."""
        written: Path = write_json(path, self.kind, VERSION, self.content())
        return written

    @classmethod
    def read(cls: type[Stored], path: str | Path) -> Stored:
        """Read a result.

        Raises:
            ValueError: If the file is damaged, lacks a field, or holds what does not follow from its rows.

        """
        data = read_json(path, cls.kind, VERSION)
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"Expected {path} to hold a result, but it lacks {missing}.")
        try:
            result = cls(**{name: cls.parsed(name, data[name]) for name in names})
        except TypeError as error:
            raise ValueError(f"Expected {path} to have the fields of a result, but: {error}.") from error
        result.check(path, data)
        return result

    @classmethod
    def parsed(cls, name: str, value: Any) -> Any:
        """A field as it stands in a file, made what it is here."""
        return [cls.row(**each) for each in value] if name == "rows" else value

    def check(self, path: str | Path, data: Mapping[str, Any]) -> None:
        """Refuse a file whose further content does not follow from its rows."""


def now() -> str:
    """ISO 8601 time."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
