"""Where inputs, targets and an optional index sit in a batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Key = int | str


@dataclass(frozen=True)
class BatchSpec:
    """Where inputs, targets and an optional sample index sit in a batch.

    A place is a position (``0``), a key or attribute (``"pixel_values"``), or a dotted path of both (``"0.image"``).
    Tuples, named tuples, lists, mappings, dataclasses and objects with attributes are understood; a replaced entry
    gives a new batch of the same type, and the batch that came in is left as it was.

    Args:
        inputs: Place of the inputs.
        targets: Place of the targets.
        index: Place of the index of each sample in its dataset, where the batch carries one.

    Example:
        >>> spec = BatchSpec()
        >>> spec.replace(("images", "labels"), targets="other labels")
        ('images', 'other labels')
        >>> BatchSpec("x", "y.fine").targets_of({"x": 1, "y": {"fine": 2, "coarse": 3}})
        2

    """

    inputs: Key = 0
    targets: Key = 1
    index: Key | None = None

    def inputs_of(self, batch: Any) -> Any:
        """The inputs of a batch."""
        return self._get("inputs", batch)

    def targets_of(self, batch: Any) -> Any:
        """The targets of a batch."""
        return self._get("targets", batch)

    def index_of(self, batch: Any) -> Tensor | None:
        """The index of each sample in its dataset, or None where the batch carries none."""
        return None if self.index is None else self._get("index", batch)

    def replace(self, batch: Any, **entries: Any) -> Any:
        """A batch of the same type with new ``inputs``, ``targets`` or ``index``."""
        for field, value in entries.items():
            place = getattr(self, field)
            if place is None:
                raise ValueError(f"Expected `BatchSpec.{field}` to name a place in the batch, but got None.")
            try:
                batch = _replaced(batch, _path(place), value)
            except (KeyError, IndexError, AttributeError, TypeError) as error:
                raise self._misfit(field, batch) from error
        return batch

    def _get(self, field: str, batch: Any) -> Any:
        entry = batch
        try:
            for key in _path(getattr(self, field)):
                entry = _entry(entry, key)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise self._misfit(field, batch) from error
        return entry

    def _misfit(self, field: str, batch: Any) -> ValueError:
        if isinstance(batch, Mapping):
            shape = f"a {type(batch).__name__} with keys {list(batch)}"
        elif isinstance(batch, tuple | list):
            shape = f"a {type(batch).__name__} of {len(batch)} entries"
        else:
            shape = f"a {type(batch).__name__}"
        return ValueError(
            f"Expected `BatchSpec.{field}` to name a place in the batch, but got {getattr(self, field)!r} and the"
            f" batch is {shape}. Pass `batch_spec=BatchSpec(inputs=..., targets=...)`."
        )


def _path(place: Key) -> list[Key]:
    if isinstance(place, int):
        return [place]
    return [int(part) if part.lstrip("-").isdigit() else part for part in place.split(".")]


def _entry(container: Any, key: Key) -> Any:
    if isinstance(container, Tensor | str):
        # rows of a tensor are samples, not entries of a batch
        raise TypeError(f"a {type(container).__name__} has no entries")
    if isinstance(container, Mapping) and key not in container:
        raise KeyError(key)
    if isinstance(container, Mapping) or (isinstance(key, int) and hasattr(container, "__getitem__")):
        return container[key]
    return getattr(container, str(key))


def _replaced(container: Any, path: list[Key], value: Any) -> Any:
    key, *rest = path
    old = _entry(container, key)
    new = value if not rest else _replaced(old, rest, value)
    if isinstance(container, Mapping):
        changed: Any = copy.copy(container)
        changed[key] = new
        return changed
    if isinstance(container, list | tuple) and isinstance(key, int):
        entries = list(container)
        entries[key] = new
        if isinstance(container, tuple):
            return type(container)(*entries) if hasattr(container, "_fields") else type(container)(entries)
        changed = copy.copy(container)
        changed[:] = entries
        return changed
    if hasattr(container, "_replace"):
        return container._replace(**{str(key): new})
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        return dataclasses.replace(container, **{str(key): new})
    changed = copy.copy(container)
    setattr(changed, str(key), new)
    return changed
