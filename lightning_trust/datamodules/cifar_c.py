"""CIFAR-10-C: the test images of CIFAR-10, corrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from lightning_trust.core.host import close_names
from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules.cifar import CIFAR10
from lightning_trust.datamodules.image_rows import ImageRows, Sample

_LEVELS = 5


class CIFAR10C(pl.LightningDataModule):
    """The test images of CIFAR-10 with noise, blur, weather and digital damage, to test what was trained on clean ones.

    "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019), arXiv:1903.12261. The
    files lie in ``root/CIFAR-10-C``, as the published archive (https://zenodo.org/records/2535967, 2.9 GB, which has to
    be unpacked by hand) lays them out: ``<corruption>.npy``, bytes of shape ``(50000, 32, 32, 3)``, severity 1 in the
    first 10,000 rows and 5 in the last; and ``labels.npy``. They are read as batches need them.

    There are test batches alone: ``[inputs, targets]``, inputs float32 ``(B, 3, 32, 32)`` in [0, 1], or normalised;
    targets int64 ``(B,)``. Every corruption and severity has equally many rows, so that accuracy over all is the mean
    of the accuracies, which the benchmark reports.

    Args:
        root: Folder that holds the folder ``CIFAR-10-C``.
        corruptions: Names of corruptions; the fifteen of the benchmark if None (see ``names``).
        severities: Some of 1, ..., 5.
        batch_size: Rows per batch.
        num_workers: Worker processes of the loader.
        test_rows: How many of the 10,000 images to keep, the same for each corruption and severity, and those that
            :class:`CIFAR10` keeps by the same ``seed``; None for all.
        seed: Seed of the permutation that chooses the images.
        normalise: Whether to subtract the mean of the training pixels of each channel and divide by their standard
            deviation, as :class:`CIFAR10` does.

    Attributes:
        names: The fifteen corruptions of the benchmark.
        extra: Four more that the archive has, for validation.

    Raises:
        ValueError: If a name is unknown, a severity is not in 1, ..., 5, something comes twice or a number is out of
            its range; in ``setup``, if a file is not what it should be.
        FileNotFoundError: In ``setup``, with the files that are missing.

    Example:
        >>> CIFAR10C(corruptions=["fog"]).corruptions, len(CIFAR10C().corruptions)
        (('fog',), 15)
        >>> CIFAR10C(severities=[6])
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `severities` to hold some of 1, ..., 5, but got [6].

    """

    names = (
        *("gaussian_noise", "shot_noise", "impulse_noise"),
        *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness"),
        *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    )
    extra = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    class_names = CIFAR10.class_names
    num_classes = len(class_names)

    test_dataset: ConcatDataset[Sample]

    def __init__(
        self,
        root: str = "data",
        corruptions: Sequence[str] | None = None,
        severities: Sequence[int] = (1, 2, 3, 4, 5),
        batch_size: int = 128,
        num_workers: int = 0,
        test_rows: int | None = None,
        seed: int = 0,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        chosen = self.names if corruptions is None else tuple(corruptions)
        known = [*self.names, *self.extra]
        for name in chosen:
            if name not in known:
                raise ValueError(
                    f"Expected argument `corruptions` to hold names of corruptions, but got {name!r}. Close names:"
                    f" {close_names(name, known)}."
                )
        if not set(severities) <= set(range(1, _LEVELS + 1)):
            raise ValueError(f"Expected argument `severities` to hold some of 1, ..., 5, but got {list(severities)}.")
        for argument, values in (("corruptions", chosen), ("severities", tuple(severities))):
            if not values or len(set(values)) != len(values):
                raise ValueError(
                    f"Expected argument `{argument}` to hold something, and nothing twice, but got {list(values)}."
                )
        for argument, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("test_rows", 1 if test_rows is None else test_rows, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"Expected argument `{argument}` to be an integer of at least {least}, got {value}.")
        self.root = root
        self.corruptions = chosen
        self.severities = tuple(severities)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.test_rows = test_rows
        self.seed = seed
        self.normalise = normalise

    @property
    def input_space(self) -> InputSpace:
        """The valid box of raw inputs, with mean and standard deviation where the data arrive normalised."""
        return InputSpace(0.0, 1.0, CIFAR10.mean, CIFAR10.std) if self.normalise else InputSpace(0.0, 1.0)

    def setup(self, stage: str | None = None) -> None:
        """Look at the files and choose the rows; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        folder = Path(self.root, "CIFAR-10-C").resolve()
        files = {name: folder / f"{name}.npy" for name in ("labels", *self.corruptions)}
        missing = [path.name for path in files.values() if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"Expected {folder} to hold the files of CIFAR-10-C, but {', '.join(missing)} are missing. Unpack"
                " CIFAR-10-C.tar of https://zenodo.org/records/2535967 there."
            )
        labels = _read(files["labels"], ())
        count, rest = divmod(len(labels), _LEVELS)
        if rest or not count:
            raise ValueError(f"Expected {files['labels']} to hold labels for 5 severities, but got {len(labels)}.")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"Expected {files['labels']} to hold labels in 0, ..., 9, but got {labels.min()} to {labels.max()}."
            )
        kept = count if self.test_rows is None else self.test_rows
        if kept > count:
            raise ValueError(
                f"Expected argument `test_rows` to be at most {count}, the images of each severity, but got {kept}."
            )
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[:kept].sort().values
        space = self.input_space
        parts = []
        for name in self.corruptions:
            images = _read(files[name], (32, 32, 3))
            if len(images) != len(labels):
                raise ValueError(
                    f"Expected {files[name]} to hold {len(labels)} images, one for each label, but got {len(images)}."
                )
            for severity in self.severities:
                level = slice((severity - 1) * count, severity * count)
                chosen = images[level]
                # all of them stay in the file, and are read as they are asked for
                chosen = chosen if kept == count else chosen[rows]
                parts.append(ImageRows(chosen.permute(0, 3, 1, 2), labels[level][rows], mean=space.mean, std=space.std))
        self.test_dataset = ConcatDataset(parts)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches of all chosen corruptions and severities, one after the other."""
        return DataLoader(
            self.test_dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The test batches."""
        return self.test_dataloader()


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Bytes of a file, left in it until they are needed."""
    try:
        # copy-on-write: tensors want memory that could be written to, and the file is not
        content: Any = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"Expected {path} to be a whole .npy file, but: {error}") from error
    if content.shape[1:] != shape or content.ndim != 1 + len(shape):
        raise ValueError(f"Expected {path} to have the shape (N, {', '.join(map(str, shape))}), got {content.shape}.")
    if shape and content.dtype != np.uint8:
        raise ValueError(f"Expected {path} to hold bytes, but got {content.dtype}.")
    return torch.from_numpy(content)
