"""Which rows of a training set are to be forgotten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ForgetClass:
    """All rows of one class.

    Args:
        label: The class.

    """

    label: int

    def rows(self, count: int, targets: Callable[[], Tensor]) -> Tensor:
        """Sorted row numbers, int64.

        Args:
            count: Number of rows of the training set.
            targets: Gives their labels, shape ``(count,)``.

        """
        labels = targets()
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                "Expected the targets of the training set to be integer class labels, one a row, because ForgetClass"
                f" looks for class {self.label}, but got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        rows = (labels == self.label).nonzero().flatten()
        if len(rows) == 0:
            present = ", ".join(str(value) for value in sorted(set(labels.tolist()))[:20])
            raise ValueError(
                f"Expected argument `label` of ForgetClass to be a class of the training set ({present}),"
                f" but got {self.label}."
            )
        return rows

    def __str__(self) -> str:
        return f"class {self.label}"


@dataclass(frozen=True)
class ForgetRandom:
    """Rows drawn at random.

    Args:
        fraction: Share of the rows, in (0, 1); exactly one of ``fraction`` and ``num`` is given.
        num: Number of rows.
        seed: Seed of the draw; a generator of its own, so that nothing else moves it.

    """

    fraction: float | None = None
    num: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.num is None):
            raise ValueError(
                "Expected exactly one of arguments `fraction` and `num` of ForgetRandom,"
                f" but got fraction={self.fraction} and num={self.num}."
            )
        if self.fraction is not None and not 0.0 < self.fraction < 1.0:
            raise ValueError(f"Expected argument `fraction` of ForgetRandom to lie in (0, 1), but got {self.fraction}.")
        if self.num is not None and self.num < 1:
            raise ValueError(f"Expected argument `num` of ForgetRandom to be at least 1, but got {self.num}.")

    def rows(self, count: int, targets: Callable[[], Tensor]) -> Tensor:
        """Sorted row numbers, int64."""
        number = self.num if self.num is not None else round((self.fraction or 0.0) * count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return order[:number].sort().values

    def __str__(self) -> str:
        if self.num is not None:
            return f"random {self.num} rows"
        return f"random {100 * (self.fraction or 0.0):g} %"


@dataclass(frozen=True)
class ForgetIndices:
    """Rows by number.

    Args:
        indices: Row numbers in the training set, without repetition.

    """

    indices: Sequence[int]

    def rows(self, count: int, targets: Callable[[], Tensor]) -> Tensor:
        """Sorted row numbers, int64."""
        rows = torch.as_tensor(list(self.indices), dtype=torch.int64)
        outside = rows[(rows < 0) | (rows >= count)]
        if len(outside):
            raise ValueError(
                f"Expected argument `indices` of ForgetIndices to lie in [0, {count - 1}], but got {outside[0].item()}."
            )
        if len(set(rows.tolist())) != len(rows):
            twice = next(row for row, times in Counter(rows.tolist()).items() if times > 1)
            raise ValueError(
                f"Expected argument `indices` of ForgetIndices to name each row once, but got {twice} several times."
            )
        return rows.sort().values

    def __str__(self) -> str:
        return f"{len(self.indices)} given rows"


ForgetSet = ForgetClass | ForgetRandom | ForgetIndices
