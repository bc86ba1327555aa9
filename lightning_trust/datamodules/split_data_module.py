"""The loaders of data that are split into training, validation and test rows."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader


class SplitDataModule(pl.LightningDataModule):
    """Batches of a training, a validation and a test set; a subclass makes these in ``setup``.

    The training rows are shuffled; prediction is of the test rows. Where the validation set is empty, or there is
    none, there is no loader for it.

    Attributes:
        train_dataset: The training rows.
        val_dataset: The validation rows, or None.
        test_dataset: The test rows.
        batch_size: Rows a batch; all rows of a part if None.
        num_workers: Worker processes of a loader.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> class Numbers(SplitDataModule):
        ...     batch_size = 2
        ...     def setup(self, stage=None):
        ...         self.train_dataset = self.test_dataset = TensorDataset(torch.arange(4))
        >>> data = Numbers()
        >>> data.setup()
        >>> list(data.test_dataloader()), data.val_dataloader()
        ([[tensor([0, 1])], [tensor([2, 3])]], [])

    """

    train_dataset: Any
    val_dataset: Any = None
    test_dataset: Any
    batch_size: Any = None
    num_workers: int = 0

    def loader_settings(self, dataset: Any) -> dict[str, Any]:
        """More arguments of the ``DataLoader`` of a part, such as ``collate_fn``."""
        return {}

    def _loader(self, dataset: Any, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size or max(1, len(dataset)),
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **self.loader_settings(dataset),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training rows."""
        return self._loader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches of the validation rows; no loader where there are none."""
        return self._loader(self.val_dataset) if self.val_dataset is not None and len(self.val_dataset) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows."""
        return self._loader(self.test_dataset)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows."""
        return self.test_dataloader()


def check_integer(name: str, value: int, least: int) -> None:
    """Refuse what is no integer, or too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Expected argument `{name}` to be an integer of at least {least}, but got {value!r}.")
