"""The handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_trust.datamodules.image_rows import ImageRowsDataModule, RandomShiftFlip

_TEST_ROWS = 360


class Digits(ImageRowsDataModule):
    """Handwritten digits with a train, validation and test split: ten classes, grey, 8 by 8 pixels, 1,797 rows.

    "Optical Recognition of Handwritten Digits" of the UCI repository, as scikit-learn ships it; nothing is downloaded.
    The last 360 rows are the test rows. Pixels count from 0 to 16 and are
    divided by 16.

    A batch is ``[inputs, targets]``: inputs float32 ``(B, 1, 8, 8)`` in [0, 1], or normalised; targets int64 ``(B,)``.

    Args:
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader; the rows are in memory, so 0 is seldom slower.
        train_rows: How many training rows to keep; None for all that are not for validation.
        val_rows: How many of the 1,437 training rows are for validation.
        test_rows: How many of the 360 test rows to keep; None for all.
        seed: Seed of the permutation that chooses the rows.
        augment: Whether training images are shifted by up to one pixel at random.
        normalise: Whether to subtract the mean of the training pixels, 0.3054, and divide by their standard deviation,
            0.3755.
        image_size: Side of the images in pixels; more than 8 enlarges them, bilinearly.

    Raises:
        ValueError: If a number is out of its range or more rows are asked for than there are.
        MisconfigurationException: If ``train_rows`` and ``val_rows`` together exceed the training rows.

    Example:
        >>> data = Digits()
        >>> data.setup()
        >>> len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)
        (1237, 200, 360)
        >>> image, label = data.test_dataset[0]
        >>> image.shape, label, data.class_names[label]
        (torch.Size([1, 8, 8]), 2, '2')

    """

    class_names = tuple("0123456789")
    mean = (0.3054,)
    std = (0.3755,)
    largest = 16
    augmentation = RandomShiftFlip(padding=1, flip=False)

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        train_rows: int | None = None,
        val_rows: int = 200,
        test_rows: int | None = None,
        seed: int = 0,
        augment: bool = False,
        normalise: bool = False,
        image_size: int = 8,
    ) -> None:
        super().__init__(batch_size, num_workers, train_rows, val_rows, test_rows, seed, augment, normalise)
        if image_size < 8:
            raise ValueError(f"Expected argument `image_size` to be at least 8, but got {image_size}.")
        self.image_size = image_size
        if image_size > 8:
            # between two of the sixteen steps of grey lie others
            self.largest = 255

    def read(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """All raw images, bytes of shape ``(N, 1, H, W)``, and labels ``(N,)`` of a part; 8 by 8 from 0 to 16."""
        images, targets = _read()
        if self.image_size > 8:
            size = [self.image_size, self.image_size]
            large = F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
            images = (large * (255.0 / 16.0)).round().to(torch.uint8)
        rows = slice(None, -_TEST_ROWS) if part == "train" else slice(-_TEST_ROWS, None)
        return images[rows], targets[rows]


@lru_cache(maxsize=1)
def _read() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(digits.target).long()
