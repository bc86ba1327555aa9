"""Fashion-MNIST with a class for each garment and rotation: a source task with many classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_trust.datamodules.fashion_mnist import FashionMNIST


class RotatedFashionMNIST(FashionMNIST):
    """Fashion-MNIST where every image is turned by one of several angles, and garment and angle make the class.

    Class ``r * 10 + g`` is garment ``g`` turned by the ``r``-th angle. Which angle an image gets depends on its row
    alone, so that every image is there once.

    A batch is ``[inputs, targets]``: inputs float32 ``(B, 1, 28, 28)`` in [0, 1], or normalised; targets int64
    ``(B,)``.

    Args:
        rotations: Angles in degrees, multiples of 90, counter-clockwise.
        root: Folder of the files.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        train_rows: How many training rows to keep; None for all that are not for validation.
        val_rows: How many of the 60,000 training rows are for validation.
        test_rows: How many of the 10,000 test rows to keep; None for all.
        seed: Seed of the permutation that chooses the rows.
        augment: Whether training images are shifted by up to two pixels and mirrored at random.
        normalise: Whether to subtract the mean of the training pixels and divide by their standard deviation.

    Raises:
        ValueError: If an angle is no multiple of 90 or comes twice.

    Example:
        >>> data = RotatedFashionMNIST(train_rows=1000)
        >>> data.num_classes, data.class_names[10]
        (40, 'T-shirt/top, 90 degrees')

    """

    def __init__(
        self,
        rotations: Sequence[int] = (0, 90, 180, 270),
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        train_rows: int | None = None,
        val_rows: int = 5000,
        test_rows: int | None = None,
        seed: int = 0,
        augment: bool = False,
        normalise: bool = False,
    ) -> None:
        super().__init__(root, batch_size, num_workers, train_rows, val_rows, test_rows, seed, augment, normalise)
        turns = [angle % 360 for angle in rotations]
        if not turns or any(angle % 90 for angle in turns) or len(set(turns)) != len(turns):
            raise ValueError(
                f"Expected argument `rotations` to hold different multiples of 90 degrees, but got {list(rotations)}."
            )
        self.rotations = tuple(turns)
        self.class_names = tuple(f"{name}, {angle} degrees" for angle in turns for name in FashionMNIST.class_names)

    def read(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """All raw images, turned, and their classes."""
        images, targets = super().read(part)
        turned, classes = images.clone(), targets.clone()
        for place, angle in enumerate(self.rotations):
            rows = slice(place, None, len(self.rotations))
            turned[rows] = torch.rot90(images[rows], angle // 90, dims=(2, 3))
            classes[rows] = targets[rows] + 10 * place
        return turned, classes
