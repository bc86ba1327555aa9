"""What one run measured: the record beside its checkpoint, which reports and tables are made of."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lightning_trust import __version__
from lightning_trust.core.files import read_json, write_json

KIND = "lightning_trust.run"
VERSION = 1
FILE_NAME = "run.json"
METRICS = ("UA", "RA", "TA", "MIA")
Role = Literal["retrain", "method"]


@dataclass(frozen=True)
class RunRecord:
    """What one unlearning run, or the Retrain it is compared with, measured and cost.

    Args:
        label: Name of the run in tables, e.g. ``"OneShotPruning + SalUn"``.
        role: ``"retrain"`` for a model trained without the forget set, else ``"method"``.
        scenario: What was to be forgotten, in words, e.g. ``"random 10 %"``.
        seed: Seed of the run; ``None`` if it was not fixed.
        forget: The forget set: ``hash`` and ``spec`` (strings) and the row counts ``forget``, ``retain``, ``test``.
        metrics: ``UA``, ``RA``, ``TA`` and ``MIA`` after the run, each in percent, in [0, 100].
        before: The same at the start of the run; ``None`` for a Retrain.
        seconds: ``steps`` (optimizer steps), ``passes`` (passes over data before training, such as a saliency mask)
            and ``fit`` (the whole fit without evaluation), each at least 0.
        confidence: Histograms of the softmax probability of the true label: ``edges`` (ascending) and, ``after`` the
            run and ``before`` it (or ``None``), counts for the ``forget`` and ``test`` rows, one fewer than edges.
        membership: How MIA was measured: ``feature`` and ``note`` (strings) and ``rows`` used a side.
        sparsity: Share of zero weights in [0, 1]; ``None`` for a dense run.
        parameters: Number of parameters.
        hardware: As :func:`hardware` gives it.
        versions: As :func:`versions` gives it.
        created: ISO 8601 time at which the run ended.

    Raises:
        ValueError: If a field is missing a part, of a wrong type, NaN or out of its range; the error names it.

    """

    label: str
    role: Role
    scenario: str
    seed: int | None
    forget: Mapping[str, Any]
    metrics: Mapping[str, float]
    before: Mapping[str, float] | None
    seconds: Mapping[str, float]
    confidence: Mapping[str, Any]
    membership: Mapping[str, Any]
    sparsity: float | None
    parameters: int
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str

    def __post_init__(self) -> None:
        for name in ("label", "scenario", "created"):
            _text(getattr(self, name), name)
        if self.role not in get_args(Role):
            raise ValueError(f"Expected `role` to be one of {list(get_args(Role))}, but got {self.role!r}.")
        if self.seed is not None:
            _count(self.seed, "seed")
        for name in ("hash", "spec"):
            _text(_part(self.forget, "forget", name), f"forget.{name}")
        for name in ("forget", "retain", "test"):
            _count(_part(self.forget, "forget", name), f"forget.{name}")
        for field, values in (("metrics", self.metrics), ("before", self.before)):
            if field == "metrics" or values is not None:
                for name in METRICS:
                    _number(_part(values, field, name), f"{field}.{name}", 0.0, 100.0)
        for name in ("steps", "passes", "fit"):
            _number(_part(self.seconds, "seconds", name), f"seconds.{name}", 0.0, math.inf)
        self._check_confidence()
        for name in ("feature", "note"):
            _text(_part(self.membership, "membership", name), f"membership.{name}", empty=True)
        _count(_part(self.membership, "membership", "rows"), "membership.rows")
        if self.sparsity is not None:
            _number(self.sparsity, "sparsity", 0.0, 1.0)
        _count(self.parameters, "parameters")
        for name in ("hardware", "versions"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"Expected `{name}` to be a mapping, but got {getattr(self, name)!r}.")

    def _check_confidence(self) -> None:
        edges = _part(self.confidence, "confidence", "edges")
        if not isinstance(edges, Sequence) or isinstance(edges, str) or len(edges) < 2:
            raise ValueError(f"Expected `confidence.edges` to be a list of at least two numbers, but got {edges!r}.")
        for edge in edges:
            _number(edge, "confidence.edges", -math.inf, math.inf)
        if any(low >= high for low, high in itertools.pairwise(edges)):
            raise ValueError(f"Expected `confidence.edges` to be ascending, but got {list(edges)}.")
        for when in ("before", "after"):
            counts = _part(self.confidence, "confidence", when)
            if counts is None and when == "before":
                continue
            for rows in ("forget", "test"):
                name = f"confidence.{when}.{rows}"
                values = _part(counts, f"confidence.{when}", rows)
                if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(edges) - 1:
                    raise ValueError(f"Expected `{name}` to be a list of {len(edges) - 1} counts, but got {values!r}.")
                for value in values:
                    _count(value, name)

    @property
    def work(self) -> float:
        """Seconds of optimizer steps and of the passes that prepare them, such as a saliency mask."""
        return float(self.seconds["steps"] + self.seconds["passes"])

    def write(self, folder: str | Path) -> Path:
        """Write the record as ``run.json`` in ``folder``, aside and renamed.

        Raises:
            OSError: If the disk is full or the folder cannot be written; nothing half-written is left behind.

        """
        return write_json(Path(folder) / FILE_NAME, KIND, VERSION, asdict(self))

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read and check a record.

        Args:
            path: The ``run.json``, or the run folder that holds it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, of another kind, of a newer schema, or a value breaks its rule.

        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        data = read_json(path, KIND, VERSION)
        names = {field.name for field in fields(cls)}
        missing = sorted(names - data.keys())
        unknown = sorted(data.keys() - names - {"kind", "version"})
        if missing or unknown:
            raise ValueError(
                f"Expected {path} to hold the fields of a run record, but got missing {missing}, unknown {unknown}."
            )
        try:
            return cls(**{name: data[name] for name in names})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def average_gap(record: RunRecord, reference: RunRecord) -> float:
    r"""Mean distance of a run to Retrain, in percentage points.

    .. math::
        \frac14 \sum_{m \in \{\mathrm{UA}, \mathrm{RA}, \mathrm{TA}, \mathrm{MIA}\}} |m - m_{\mathrm{Retrain}}|

    Paper: Model Sparsity Can Simplify Machine Unlearning, NeurIPS 2023, arXiv:2304.04934.

    Args:
        record: The run.
        reference: A Retrain with the same forget set.

    Returns:
        The gap in percentage points, in [0, 100]; smaller is better.

    Raises:
        ValueError: If the two runs forget different rows.

    """
    if record.forget["hash"] != reference.forget["hash"]:
        raise ValueError(
            "Expected argument `reference` to have the forget set of `record`"
            f" ({record.forget['hash']}), but got {reference.forget['hash']}."
        )
    return metrics_gap(record.metrics, reference.metrics)


def metrics_gap(metrics: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Mean of the absolute differences of UA, RA, TA and MIA, in percentage points.

    Example:
        >>> retrain = {"UA": 9.0, "RA": 99.0, "TA": 90.0, "MIA": 13.0}
        >>> metrics_gap({"UA": 7.0, "RA": 99.0, "TA": 91.0, "MIA": 12.0}, retrain)
        1.0

    """
    return sum(abs(metrics[name] - reference[name]) for name in METRICS) / len(METRICS)


def hardware(device: torch.device | None = None) -> dict[str, Any]:
    """What the run ran on: ``cpu`` (model), ``cores`` usable, ``accelerator`` (name or ``None``), ``memory_gib``.

    Args:
        device: Device of the run; by default the accelerator that is there, if any.

    """
    accelerator = None
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        accelerator = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        accelerator = device.type
    return {"cpu": _cpu(), "cores": _cores(), "accelerator": accelerator, "memory_gib": _memory_gib()}


def versions() -> dict[str, str]:
    """Versions of Python, torch, lightning and lightning_trust."""
    try:
        lightning = importlib.metadata.version("lightning")
    except importlib.metadata.PackageNotFoundError:  # a host may bring the older name alone
        lightning = importlib.metadata.version("pytorch-lightning")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": lightning,
        "lightning_trust": __version__,
    }


def _cpu() -> str:
    # platform.processor() is empty on Linux, where the name stands in cpuinfo (not so on ARM)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    # a container or a scheduler may allow fewer cores than the machine has
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _part(mapping: object, field: str, name: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"Expected `{field}` to be a mapping, but got {mapping!r}.")
    if name not in mapping:
        raise ValueError(f"Expected `{field}` to have the key '{name}', but got the keys {sorted(mapping)}.")
    return mapping[name]


def _text(value: object, name: str, empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"Expected `{name}` to be a string{'' if empty else ' that is not empty'}, but got {value!r}.")


def _count(value: object, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"Expected `{name}` to be an integer of at least 0, but got {value!r}.")


def _number(value: object, name: str, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"Expected `{name}` to be a finite number, but got {value!r}.")
    if not low <= value <= high:
        rule = f"in [{low:g}, {high:g}]" if high < math.inf else f"at least {low:g}"
        raise ValueError(f"Expected `{name}` to be {rule}, but got {value!r}.")
