"""Which rows of a source data set are kept: computed by a pruner, written as a file, checked against the data."""

from __future__ import annotations

import hashlib
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.files import read_tensors, write_tensors
from lightning_trust.datamodules.rows import dataset_targets

KIND = "lightning_trust.prune_result"
VERSION = 1
Unit = Literal["class", "cluster", "row"]


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What a pruner keeps of a source data set: a coreset.

    Args:
        pruner: Name of the class that made it.
        unit: What was chosen among: ``"class"``, ``"cluster"`` or ``"row"``.
        class_scores: Score of each class or cluster, shape ``(G,)``: counts of target images, or, where rows were
            chosen, the number of rows kept of each class.
        kept_classes: Classes or clusters of which rows are kept, ascending, int64.
        kept_indices: Numbers of the rows that are kept, ascending, int64.
        source_rows: Number of rows of the source.
        source_hash: Names the source; see :func:`dataset_hash`.
        seconds: What the choice took.

    Raises:
        ValueError: If no row is kept, or row numbers are not ascending numbers of rows of the source.

    Example:
        >>> result = PruneResult("LabelMappingPruner", "class", torch.tensor([0, 7, 2]), torch.tensor([1, 2]),
        ...                      torch.tensor([0, 3, 4]), source_rows=6, source_hash="ab")
        >>> result.label_map, result.kept_share
        ({1: 0, 2: 1}, 0.5)

    """

    pruner: str
    unit: Unit
    class_scores: Tensor
    kept_classes: Tensor
    kept_indices: Tensor
    source_rows: int
    source_hash: str
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"Expected argument `unit` to be one of {list(get_args(Unit))}, but got {self.unit!r}.")
        rows = self.kept_indices
        if not len(rows):
            raise ValueError(
                f"Expected {self.pruner} to keep rows of the source, but it keeps none of {self.source_rows}."
                " Raise `keep_ratio`."
            )
        if int(rows[0]) < 0 or int(rows[-1]) >= self.source_rows or bool((rows.diff() <= 0).any()):
            raise ValueError(
                f"Expected argument `kept_indices` to be ascending numbers in [0, {self.source_rows}), each once."
            )

    @property
    def kept_share(self) -> float:
        """Share of the rows that are kept, in (0, 1]."""
        return len(self.kept_indices) / self.source_rows

    @property
    def zero_scores_kept(self) -> int:
        """How many of the kept classes no target image was mapped to."""
        return 0 if self.unit == "row" else int((self.class_scores[self.kept_classes] == 0).sum())

    @property
    def label_map(self) -> dict[int, int]:
        """New label of each kept class: ``0, 1, ...`` in their order; ``kept_classes[new]`` is the old one.

        Raises:
            MisconfigurationException: If clusters were chosen, which are no labels.

        """
        if self.unit == "cluster":
            raise MisconfigurationException(
                "Labels can be counted anew where classes or rows were chosen, but this result keeps clusters."
                " Leave `remap_labels` out."
            )
        return {old: new for new, old in enumerate(self.kept_classes.tolist())}

    @property
    def hash(self) -> str:
        """Names the kept rows: equal for equal rows of equal sources."""
        content = f"{self.source_rows}:{self.source_hash}:".encode() + self.kept_indices.numpy().tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def __str__(self) -> str:
        classes = (
            f"{len(self.kept_classes)} of {len(self.class_scores)} {'cluster' if self.unit == 'cluster' else 'class'}"
        )
        plural = "s" if self.unit == "cluster" else "es"
        return f"{self.pruner}: {len(self.kept_indices)} of {self.source_rows} rows, {classes}{plural}"

    def check_source(self, dataset: Any, batch_spec: BatchSpec) -> None:
        """Refuse a data set that is not the one from which rows were chosen.

        Raises:
            MisconfigurationException: If the number of rows, or a label, differs.

        """
        rows, found = len(cast(Sized, dataset)), dataset_hash(dataset, batch_spec)
        if rows != self.source_rows or found != self.source_hash:
            raise MisconfigurationException(
                f"Expected the source from which rows were chosen ({self.source_rows} rows, {self.source_hash}), but"
                f" got {rows} rows, {found}. Take the same training set in the same order, or choose anew."
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, aside and renamed."""
        tensors = {"class_scores": self.class_scores, "kept_classes": self.kept_classes}
        return write_tensors(
            path,
            KIND,
            VERSION,
            {**tensors, "kept_indices": self.kept_indices},
            pruner=self.pruner,
            unit=self.unit,
            source_rows=str(self.source_rows),
            source_hash=self.source_hash,
            seconds=repr(self.seconds),
        )

    @classmethod
    def load(cls, path: str | Path) -> PruneResult:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, of another kind, or of a newer schema.

        """
        tensors, meta = read_tensors(path, KIND, VERSION)
        names = ("class_scores", "kept_classes", "kept_indices")
        try:
            return cls(
                pruner=meta["pruner"],
                unit=cast(Unit, meta["unit"]),
                **{name: tensors[name] for name in names},
                source_rows=int(meta["source_rows"]),
                source_hash=meta["source_hash"],
                seconds=float(meta["seconds"]),
            )
        except KeyError as error:
            raise ValueError(f"Expected {path} to hold a whole result of a pruner, but it lacks {error}.") from error


def dataset_hash(dataset: Any, batch_spec: BatchSpec, labels: Tensor | None = None) -> str:
    """Names a data set: equal for equal numbers of rows with equal labels in equal order.

    What is in the rows is not read, for augmentation changes it. Without labels the number of rows is all there is.

    Args:
        dataset: The data set.
        batch_spec: Where the label sits in a sample.
        labels: Its labels, where they are known.

    """
    labels = labels_of(dataset, batch_spec) if labels is None else labels
    content = f"{len(dataset)}:".encode()
    if labels is not None:
        content += labels.cpu().to(torch.float64 if labels.is_floating_point() else torch.int64).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def labels_of(dataset: Any, batch_spec: BatchSpec) -> Tensor | None:
    """Labels of a map-style data set, or None where its rows have none."""
    try:
        return dataset_targets(dataset, batch_spec)
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError):
        return None


def class_labels(dataset: Any, batch_spec: BatchSpec, owner: str) -> Tensor:
    """Integer labels of a source data set, one a row.

    Raises:
        ValueError: If it has none.

    """
    labels = labels_of(dataset, batch_spec)
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or (len(labels) and int(labels.min()) < 0):
        found = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(
            f"Expected the source to have class labels, one a row, at least 0, for {owner} to choose among classes, but"
            f" got {found}. Feature mapping with kmeans needs no labels: FeatureMappingPruner(groups='kmeans')."
        )
    return labels.cpu().to(torch.int64)
