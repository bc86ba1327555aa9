"""The diabetes study, with its patients' sex as the sensitive attribute."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_trust.datamodules.split_data_module import SplitDataModule

Part = Literal["base", "tuning"]
_SEX = 1


class Diabetes(SplitDataModule):
    """Does the disease progress more than it does in half of the patients? 442 of them, with ten measurements each.

    The data set of "Least Angle Regression" (Annals of Statistics 2004), which comes with scikit-learn. The group is
    the column ``sex``, which is coded as two values without names, and stays among the features. Features have mean 0
    and standard deviation 1 over all patients. A batch is ``[inputs, targets, groups]``: inputs float32 ``(B, 10)``,
    targets and groups int64 ``(B,)``.

    Args:
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        part: Training rows: ``"base"``, on which a classifier is trained, or ``"tuning"``, on which it is made fair.
        train_rows: How many rows of the part to keep; None for all.
        base_rows: Size of the part ``"base"``; the rows that are left are for tuning.
        val_rows: Rows for validation.
        test_rows: Rows for the test.
        seed: Seed of the permutation that chooses the rows.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If there are fewer rows than are asked for.

    Example:
        >>> data = Diabetes(part="tuning")
        >>> data.setup()
        >>> len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)
        (102, 60, 120)
        >>> [tuple(part.shape) for part in data.test_dataset.tensors]
        [(120, 10), (120,), (120,)]

    """

    class_names = ("less", "more")
    num_classes = 2
    num_groups = 2
    num_features = 10

    train_dataset: TensorDataset
    val_dataset: TensorDataset
    test_dataset: TensorDataset

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        part: Part = "base",
        train_rows: int | None = None,
        base_rows: int = 160,
        val_rows: int = 60,
        test_rows: int = 120,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if part not in get_args(Part):
            raise ValueError(f"Expected argument `part` to be 'base' or 'tuning', but got {part!r}.")
        counts = {"batch_size": batch_size, "base_rows": base_rows, "val_rows": val_rows, "test_rows": test_rows}
        if train_rows is not None:
            counts["train_rows"] = train_rows
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.part: Part = part
        self.train_rows = train_rows
        self.base_rows = base_rows
        self.val_rows = val_rows
        self.test_rows = test_rows
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data set; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        inputs, targets, groups = _read()
        held = self.val_rows + self.test_rows
        sizes = {"base": self.base_rows, "tuning": len(targets) - held - self.base_rows}
        kept = sizes[self.part] if self.train_rows is None else self.train_rows
        if min(sizes.values()) < 0 or not 1 <= kept <= sizes[self.part]:
            raise MisconfigurationException(
                f"Expected arguments `base_rows`, `val_rows`, `test_rows` and `train_rows` to share the {len(targets)}"
                f" rows of Diabetes, but got {self.base_rows}, {self.val_rows}, {self.test_rows} and {self.train_rows}"
                f" for part='{self.part}'."
            )
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(self.seed))
        first = held + (self.base_rows if self.part == "tuning" else 0)
        chosen = (order[: self.test_rows], order[self.test_rows : held], order[first : first + kept])
        self.test_dataset, self.val_dataset, self.train_dataset = (
            TensorDataset(inputs[rows], targets[rows], groups[rows]) for rows in chosen
        )


def _read() -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    raw = torch.from_numpy(data.data)
    inputs = ((raw - raw.mean(dim=0)) / raw.std(dim=0)).float()
    progression = torch.from_numpy(data.target)
    return inputs, (progression > progression.median()).long(), (raw[:, _SEX] > 0.0).long()
