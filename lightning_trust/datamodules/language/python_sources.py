"""Python's own standard library as text: real, and always there."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from lightning_trust.core.randomness import derived_seed
from lightning_trust.datamodules.language.text_rows import Part

#: folders of what is no source of the library, or is there in some distributions only
_LEFT_OUT = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
#: shares of the bytes
_TEST, _VAL = 0.2, 0.1


def source_files(sources: str | None, package: str | None = None) -> dict[str, Path]:
    """Python files by their names below the root, sorted.

    Args:
        sources: A folder; the standard library of the running interpreter if None.
        package: A package right below it; all of it if None.

    Raises:
        ValueError: If there are none.

    """
    base = Path(sysconfig.get_paths()["stdlib"] if sources is None else sources)
    found = {}
    for folder, below, files in os.walk(base if package is None else base / package):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            found[path.relative_to(base).as_posix()] = path
    if not found:
        where = f"`sources`={str(base)!r}" if package is None else f"the package '{package}' in {str(base)!r}"
        raise ValueError(f"Expected {where} to hold Python files, but got none.")
    return dict(sorted(found.items()))


def files_of(part: Part, files: Mapping[str, Path], seed: int) -> list[Path]:
    """The files of a part: those of a fifth of the bytes are for the test, of a tenth for validation, or a little more.

    Args:
        part: The part.
        files: All files by name; at least three.
        seed: Decides which.

    Raises:
        ValueError: If there are fewer than three.

    """
    if len(files) < 3:
        raise ValueError(f"Expected at least 3 files, one a part, but got {list(files)}.")
    sizes = {name: path.stat().st_size for name, path in files.items()}
    left = sorted(files, key=lambda name: derived_seed("split", seed, name))
    parts: dict[Part, list[str]] = {}
    held_out: tuple[tuple[Part, float, int], ...] = (("test", _TEST, 2), ("val", _VAL, 1))
    for name, share, others in held_out:
        taken = [left.pop(0)]
        while sum(sizes[file] for file in taken) < share * sum(sizes.values()) and len(left) > others:
            taken.append(left.pop(0))
        parts[name] = taken
    parts["train"] = left
    return [files[name] for name in sorted(parts[part])]


def read_source(path: Path) -> str:
    """Text of a file; bytes that are no UTF-8 are replaced."""
    return path.read_text(encoding="utf-8", errors="replace")
