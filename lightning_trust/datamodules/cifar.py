"""CIFAR-10, downloaded by torchvision."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_trust.datamodules.image_rows import ImageRowsDataModule, RandomShiftFlip


class CIFAR10(ImageRowsDataModule):
    """CIFAR-10 with a train, validation and test split: photographs in ten classes, coloured, 32 by 32 pixels.

    "Learning Multiple Layers of Features from Tiny Images" (A. Krizhevsky, technical report, 2009). The files are
    torchvision's ``cifar-10-batches-py`` in ``root``, checked by their sums and downloaded where they are missing.
    They are read once a process.

    A batch is ``[inputs, targets]``: inputs float32 ``(B, 3, 32, 32)`` in [0, 1], or normalised; targets int64
    ``(B,)``.

    Args:
        root: Folder of the files.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader; the rows are in memory, so a few are for the augmentation.
        train_rows: How many training rows to keep; None for all that are not for validation.
        val_rows: How many of the 50,000 training rows are for validation.
        test_rows: How many of the 10,000 test rows to keep; None for all.
        seed: Seed of the permutation that chooses the rows.
        augment: Whether training images are shifted by up to four pixels and mirrored at random.
        normalise: Whether to subtract the mean of the training pixels of each channel, (0.4914, 0.4822, 0.4465), and
            divide by their standard deviation, (0.2470, 0.2435, 0.2616).

    Raises:
        ValueError: If a number is out of its range or more rows are asked for than there are.
        MisconfigurationException: If ``train_rows`` and ``val_rows`` together exceed the training rows.
        FileNotFoundError: In ``setup``, if the files are missing or damaged and ``prepare_data`` has not downloaded
            them.

    Example:
        >>> data = CIFAR10(train_rows=45000)
        >>> data.class_names[3], data.num_classes, data.batch_size
        ('cat', 10, 128)

    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    augmentation = RandomShiftFlip(padding=4)

    def __init__(
        self,
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
        super().__init__(batch_size, num_workers, train_rows, val_rows, test_rows, seed, augment, normalise)
        self.root = root

    def prepare_data(self) -> None:
        """Download the files through torchvision where they are missing."""
        import torchvision

        torchvision.datasets.CIFAR10(self.root, download=True)

    def read(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """All raw images, bytes of shape ``(N, 3, 32, 32)``, and labels ``(N,)`` of a part of the data set."""
        return _read(Path(self.root).resolve(), part)


@lru_cache(maxsize=2)
def _read(root: Path, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    import torchvision

    try:
        # torchvision unpickles the files only if their sums are the published ones
        rows = torchvision.datasets.CIFAR10(str(root), train=part == "train")
    except RuntimeError as error:
        raise FileNotFoundError(
            f"Expected whole files of CIFAR-10 in {root / 'cifar-10-batches-py'}, but they are missing or damaged."
            " `prepare_data()` downloads them."
        ) from error
    images = torch.from_numpy(rows.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(rows.targets)
