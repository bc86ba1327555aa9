"""A few garments of Fashion-MNIST, of rows that another task does not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_trust.datamodules.fashion_mnist import FashionMNIST


class FashionMNISTSubset(FashionMNIST):
    """Some classes of Fashion-MNIST: a target task beside a source task made of the same images, without sharing any.

    Class ``i`` is the ``i``-th of ``garments``. The first ``skip_rows`` training rows that another data module of
    Fashion-MNIST with the same ``seed`` would take, its validation rows included, are left to it.

    A batch is ``[inputs, targets]``: inputs float32 ``(B, 1, 28, 28)`` in [0, 1], or normalised; targets int64
    ``(B,)``.

    Args:
        garments: Classes of Fashion-MNIST. By default what is worn above the hips: T-shirt, pullover, dress, coat and
            shirt.
        skip_rows: How many of the 60,000 training rows are left to another task.
        root: Folder of the files.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        train_rows: How many training rows to keep; None for all that are not for validation.
        val_rows: How many of the training rows are for validation.
        test_rows: How many of the test rows to keep; None for all.
        seed: Seed of the permutations that choose the rows.
        augment: Whether training images are shifted by up to two pixels and mirrored at random.
        normalise: Whether to subtract the mean of the training pixels and divide by their standard deviation.

    Raises:
        ValueError: If a garment is out of range or comes twice, or ``skip_rows`` is not in [0, 60000).

    Example:
        >>> data = FashionMNISTSubset(skip_rows=30000, train_rows=500, val_rows=0)
        >>> data.setup()
        >>> data.class_names, len(data.train_dataset), len(data.test_dataset)
        (('T-shirt/top', 'Pullover', 'Dress', 'Coat', 'Shirt'), 500, 5000)

    """

    def __init__(
        self,
        garments: Sequence[int] = (0, 2, 3, 4, 6),
        skip_rows: int = 0,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        train_rows: int | None = None,
        val_rows: int = 500,
        test_rows: int | None = None,
        seed: int = 0,
        augment: bool = False,
        normalise: bool = False,
    ) -> None:
        super().__init__(root, batch_size, num_workers, train_rows, val_rows, test_rows, seed, augment, normalise)
        names = FashionMNIST.class_names
        if not garments or len(set(garments)) != len(garments) or not all(0 <= each < len(names) for each in garments):
            raise ValueError(
                f"Expected argument `garments` to hold different classes in [0, {len(names)}), but got"
                f" {list(garments)}."
            )
        if not 0 <= skip_rows < 60_000:
            raise ValueError(f"Expected argument `skip_rows` to lie in [0, 60000), but got {skip_rows}.")
        self.garments = tuple(garments)
        self.skip_rows = skip_rows
        self.class_names = tuple(names[each] for each in garments)

    def read(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """All raw images of these garments that are not left to another task, and their classes."""
        images, targets = super().read(part)
        if part == "train":
            rows = self._permutation(len(images))[self.skip_rows :].sort().values
            images, targets = images[rows], targets[rows]
        new = torch.full((len(FashionMNIST.class_names),), -1)
        new[list(self.garments)] = torch.arange(len(self.garments))
        kept = new[targets] >= 0
        return images[kept], new[targets[kept]]
