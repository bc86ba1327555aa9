"""What a robust evaluation measured: the record that reports are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightning_trust.core.files import read_json, write_json

KIND = "lightning_trust.robustness"
VERSION = 1
FILE_NAME = "robustness.json"
EXAMPLES_NAME, EXAMPLES_KIND = "robustness_examples.safetensors", "lightning_trust.examples"


@dataclass(frozen=True)
class RobustnessRecord:
    """Clean, per-attack and union accuracy of one network.

    Args:
        label: Name of the run in tables, e.g. ``"TRADES + AWP"``.
        seed: Seed of the run; ``None`` if it was not fixed.
        samples: Number of samples.
        accuracy: ``clean``, each attack's name and ``union`` -> ``value``, ``low`` and ``high`` (95 %), in [0, 1].
        attacks: Name -> ``attack`` (what it was, in words), ``eps`` (or ``None``), ``norm`` and ``seconds``.
        curves: Name -> points ``[eps, accuracy]`` with ascending eps.
        examples: Name of the file beside this one that holds example inputs, or ``None``.
        random: Whether the network was found not to be deterministic.
        weights: Hash of the network's weights.
        epochs: Epochs that the network was trained in this run, and ``train_seconds`` an epoch, where known.
        train_seconds: Median seconds of a training epoch; ``None`` if the run did not train.
        hardware: As :func:`~lightning_trust.core.records.hardware` gives it.
        versions: As :func:`~lightning_trust.core.records.versions` gives it.
        created: ISO 8601 time at which the evaluation ended.

    Raises:
        ValueError: If an accuracy is missing a part or out of its range.

    """

    label: str
    seed: int | None
    samples: int
    accuracy: Mapping[str, Mapping[str, float]]
    attacks: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, Sequence[Sequence[float]]]
    examples: str | None
    random: bool
    weights: str
    epochs: int | None
    train_seconds: float | None
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str

    def __post_init__(self) -> None:
        wanted = {"clean", "union", *self.attacks}
        if set(self.accuracy) != wanted:
            raise ValueError(f"Expected `accuracy` to have the keys {sorted(wanted)}, but got {sorted(self.accuracy)}.")
        for name, values in self.accuracy.items():
            for part in ("low", "value", "high"):
                value = values.get(part)
                if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                    raise ValueError(f"Expected `accuracy.{name}.{part}` to be in [0, 1], but got {value!r}.")

    def write(self, folder: str | Path) -> Path:
        """Write the record as ``robustness.json`` in ``folder``, aside and renamed."""
        return write_json(Path(folder) / FILE_NAME, KIND, VERSION, asdict(self))

    @classmethod
    def read(cls, path: str | Path) -> RobustnessRecord:
        """Read and check a record.

        Args:
            path: The ``robustness.json``, or the run folder that holds it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, of another kind, of a newer schema, or a value breaks its rule.

        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        data = read_json(path, KIND, VERSION)
        names = {field.name for field in fields(cls)}
        missing, unknown = sorted(names - data.keys()), sorted(data.keys() - names - {"kind", "version"})
        if missing or unknown:
            raise ValueError(
                f"Expected {path} to hold the fields of a robustness record, but got missing {missing}, unknown"
                f" {unknown}."
            )
        return cls(**{name: data[name] for name in names})
