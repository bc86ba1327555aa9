"""A simulator's answers in a file: they outlive the run, and are not asked for again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_KIND, _VERSION = "lightning_trust.simulator_answers", 1


class AnswerFile:
    """JSON lines: first what was asked and how many numbers an answer has, then one answered row a line.

    A line is appended as a whole; one that a kill has cut short is dropped when the file is read again. Numbers are
    written so that they are read back bit for bit. Each rank has a file of its own (``answers.rank1.jsonl`` beside
    ``answers.jsonl``) and reads those of all.

    Args:
        path: The file.
        simulator: Name of the simulator; answers of another one are refused.
        out_dim: Numbers in an answer.
        rank: Rank of this process.

    """

    def __init__(self, path: str | Path, simulator: str, out_dim: int, rank: int = 0) -> None:
        path = Path(path)
        self.base = path
        self.path = path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
        self.head = {"kind": _KIND, "version": _VERSION, "simulator": simulator, "out_dim": out_dim}

    def read(self) -> dict[bytes, Array]:
        """All answers by :func:`point_key`.

        Raises:
            ValueError: If a file is of another kind, of another simulator, or damaged other than at its end.

        """
        found: dict[bytes, Array] = {}
        others = sorted(self.base.parent.glob(f"{self.base.stem}.rank*{self.base.suffix}"))
        for path in dict.fromkeys([self.base, *others]):
            if path.is_file():
                for entry in self._entries(path):
                    found[point_key(entry["z"], entry.get("seed"))] = np.asarray(entry["g"], dtype=np.float64)
        return found

    def append(self, points: Iterable[Array], answers: Iterable[Array], seeds: Iterable[int] | None = None) -> None:
        """Add answered rows."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries: list[dict[str, Any]] = [
            {"z": point.tolist(), "g": answer.tolist()} for point, answer in zip(points, answers, strict=True)
        ]
        if seeds is not None:
            for entry, seed in zip(entries, seeds, strict=True):
                entry["seed"] = int(seed)
        lines = [json.dumps(entry, allow_nan=False) for entry in entries]
        with self.path.open("ab+") as file:
            file.seek(0, 2)
            if file.tell() == 0:
                lines.insert(0, json.dumps(self.head))
            else:
                # what a kill has cut short
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    content = self.path.read_bytes()
                    file.truncate(content.rfind(b"\n") + 1)
                    if b"\n" not in content:
                        lines.insert(0, json.dumps(self.head))
            file.write(("\n".join(lines) + "\n").encode())

    def _entries(self, path: Path) -> list[dict[str, Any]]:
        *lines, last = path.read_bytes().split(b"\n")
        del last  # empty, or cut short
        try:
            entries = [json.loads(line) for line in lines]
            head = dict(**entries[0]) if entries else self.head
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"Expected {path} to hold a simulator's answers, but it is damaged: {error}.") from error
        if head != self.head:
            raise ValueError(
                f"Expected {path} to hold the answers of {self.head}, but got those of {head}. Name another file."
            )
        return entries[1:]


def point_key(point: Any, seed: int | None = None) -> bytes:
    """What tells a point, and the seed that it was asked with, from all others: its bits."""
    # 0.0 and -0.0 are the same point
    key = (np.asarray(point, dtype=np.float64) + 0.0).tobytes()
    return key if seed is None else key + int(seed).to_bytes(8, "little")
