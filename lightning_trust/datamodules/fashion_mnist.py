"""Fashion-MNIST: from a folder, from Debian's package, or downloaded."""

from __future__ import annotations

import gzip
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_trust.datamodules.image_rows import ImageRowsDataModule, RandomShiftFlip

#: Where the package dataset-fashion-mnist of Debian and Ubuntu puts the files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class FashionMNIST(ImageRowsDataModule):
    """Fashion-MNIST with a train, validation and test split: clothes in ten classes, grey, 28 by 28 pixels.

    "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", arXiv:1708.07747. The files
    are looked for in ``root`` (the four idx files, gzipped or not, or torchvision's ``FashionMNIST/raw``), then in the
    folder of Debian's package ``dataset-fashion-mnist``, and else downloaded into ``root`` by torchvision. They are
    read once a process.

    A batch is ``[inputs, targets]``: inputs float32 ``(B, 1, 28, 28)`` in [0, 1], or normalised; targets int64
    ``(B,)``.

    Args:
        root: Folder of the files.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader; the rows are in memory, so 0 is seldom slower.
        train_rows: How many training rows to keep; None for all that are not for validation.
        val_rows: How many of the 60,000 training rows are for validation.
        test_rows: How many of the 10,000 test rows to keep; None for all.
        seed: Seed of the permutation that chooses the rows.
        augment: Whether training images are shifted by up to two pixels and mirrored at random.
        normalise: Whether to subtract the mean of the training pixels, 0.2860, and divide by their standard deviation,
            0.3530.

    Raises:
        ValueError: If a number is out of its range, more rows are asked for than there are, or a file is damaged.
        MisconfigurationException: If ``train_rows`` and ``val_rows`` together exceed the training rows.
        FileNotFoundError: In ``setup``, if the files are nowhere and ``prepare_data`` has not downloaded them.

    Example:
        >>> data = FashionMNIST(train_rows=12000)
        >>> data.prepare_data()
        >>> data.setup()
        >>> len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)
        (12000, 5000, 10000)
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, targets.shape
        (torch.Size([128, 1, 28, 28]), torch.Size([128]))
        >>> data.class_names[int(data.train_dataset.targets[0])]
        'Sneaker'

    """

    class_names: tuple[str, ...] = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    mean = (0.2860,)
    std = (0.3530,)
    augmentation = RandomShiftFlip(padding=2)

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

    def _folder(self) -> Path | None:
        """The first folder that holds all four files."""
        root = Path(self.root)
        return next(
            (folder for folder in (root, root / "FashionMNIST" / "raw", DEBIAN_FOLDER) if _complete(folder)), None
        )

    def prepare_data(self) -> None:
        """Download the files through torchvision where they are in none of the folders."""
        if self._folder() is None:
            import torchvision

            torchvision.datasets.FashionMNIST(self.root, download=True)

    def read(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """All raw images, bytes of shape ``(N, 1, 28, 28)``, and labels ``(N,)`` of a part of the data set."""
        folder = self._folder()
        if folder is None:
            raise FileNotFoundError(
                f"Expected the files of Fashion-MNIST in {Path(self.root).resolve()} or {DEBIAN_FOLDER}, but they are"
                " in neither. `prepare_data()` downloads them; on Debian and Ubuntu: apt-get install"
                " dataset-fashion-mnist."
            )
        return _read(folder.resolve(), part)


def _complete(folder: Path) -> bool:
    return all(_find(folder, name) is not None for names in _FILES.values() for name in names)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


@lru_cache(maxsize=4)
def _read(folder: Path, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    images, targets = (_read_idx(path) for name in _FILES[part] if (path := _find(folder, name)) is not None)
    if images.ndim != 3 or targets.ndim != 1 or len(images) != len(targets):
        raise ValueError(
            f"Expected the {part} files of Fashion-MNIST in {folder} to hold as many images as labels,"
            f" but got shapes {tuple(images.shape)} and {tuple(targets.shape)}."
        )
    return images.unsqueeze(1), targets.long()


def _read_idx(path: Path) -> Tensor:
    """An idx file of bytes: two zeros, the type 8, the number of dimensions, the sizes (big-endian), the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != b"\x00\x00\x08":
            raise ValueError("it does not begin like an idx file of bytes")
        start = 4 + 4 * content[3]
        shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
        # torch reads the buffer in place: bytearray, because a tensor must be writable
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
    except (EOFError, IndexError, OSError, RuntimeError, ValueError, zlib.error) as error:
        raise ValueError(f"Expected {path} to be a whole idx file, but it is damaged: {error}.") from error
