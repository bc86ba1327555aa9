"""CelebA: faces with 40 attributes, of which one is the class and one the group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from lightning_trust.core.host import close_names
from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules.split_data_module import SplitDataModule

Part = Literal["base", "tuning"]
_ATTRIBUTES, _PARTITION, _IMAGES = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"


class CelebA(SplitDataModule):
    """Faces of CelebA: an attribute to tell, and one that must not count.

    "Deep Learning Face Attributes in the Wild" (ICCV 2015). Files are looked for in ``root/celeba``, as torchvision
    lays them out, and else downloaded by it (1.4 GB, for research only). A batch is ``[inputs, targets, groups]``:
    inputs float32 ``(B, 3, S, S)`` in [0, 1], targets and groups int64 ``(B,)``, 1 where the face has the attribute.

    Training images are resized to 8/7 of ``image_size`` and cropped at random, the others in the middle. The 162,770
    training images are split into ``"base"``, on which a classifier is trained, and ``"tuning"``, on which it is made
    fair.

    Args:
        root: Folder that holds the folder ``celeba``.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        part: ``"base"`` or ``"tuning"``.
        base_share: Share of the training images that are the part ``"base"``, in (0, 1).
        train_rows: How many rows of the part to keep; None for all.
        target: Attribute that is the class.
        sensitive: Attribute that is the group.
        image_size: Side of an image in pixels.
        seed: Seed of the split.

    Raises:
        ValueError: If an argument is out of its range, or names no attribute (in ``setup``).
        MisconfigurationException: If there are fewer rows than are asked for.
        FileNotFoundError: In ``setup``, if the files are nowhere.

    Example:
        >>> CelebA(part="tuning").target
        'Blond_Hair'

    """

    num_classes = 2
    num_groups = 2

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 4,
        part: Part = "base",
        base_share: float = 0.5,
        train_rows: int | None = None,
        target: str = "Blond_Hair",
        sensitive: str = "Male",
        image_size: int = 224,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if part not in get_args(Part):
            raise ValueError(f"Expected argument `part` to be 'base' or 'tuning', but got {part!r}.")
        if not 0.0 < base_share < 1.0:
            raise ValueError(f"Expected argument `base_share` to be in (0, 1), but got {base_share}.")
        for name, value in (("batch_size", batch_size), ("image_size", image_size), ("train_rows", train_rows)):
            if value is not None and value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        self.root = root
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.part: Part = part
        self.base_share = base_share
        self.train_rows = train_rows
        self.target = target
        self.sensitive = sensitive
        self.image_size = image_size
        self.seed = seed

    @property
    def input_space(self) -> InputSpace:
        """The valid box of raw inputs."""
        return InputSpace(0.0, 1.0)

    @property
    def _folder(self) -> Path:
        return Path(self.root, "celeba")

    def prepare_data(self) -> None:
        """Download the files through torchvision where they are not there."""
        if not all((self._folder / name).exists() for name in (_ATTRIBUTES, _PARTITION, _IMAGES)):
            import torchvision

            torchvision.datasets.CelebA(self.root, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the attributes and split the images; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        names, rows = _read(self._folder)
        for argument in ("target", "sensitive"):
            if getattr(self, argument) not in names:
                raise ValueError(
                    f"Expected argument `{argument}` to be an attribute of CelebA, but got"
                    f" {getattr(self, argument)!r}. Close names: {close_names(getattr(self, argument), names)}."
                )
        columns = [names.index(self.target), names.index(self.sensitive)]
        chosen = {split: [(file, values[columns[0]], values[columns[1]]) for file, of, values in rows if of == split]
                  for split in (0, 1, 2)}  # fmt: skip
        order = torch.randperm(len(chosen[0]), generator=torch.Generator().manual_seed(self.seed)).tolist()
        base = round(self.base_share * len(order))
        part = order[:base] if self.part == "base" else order[base:]
        kept = len(part) if self.train_rows is None else self.train_rows
        if not 1 <= kept <= len(part):
            raise MisconfigurationException(
                f"Expected argument `train_rows` to be at most {len(part)}, the rows of part='{self.part}', but got"
                f" {self.train_rows}."
            )
        train = [chosen[0][row] for row in sorted(part[:kept])]
        self.train_dataset = _Faces(self._folder / _IMAGES, train, self._transform(train=True))
        self.val_dataset = _Faces(self._folder / _IMAGES, chosen[1], self._transform())
        self.test_dataset = _Faces(self._folder / _IMAGES, chosen[2], self._transform())

    def _transform(self, train: bool = False) -> Callable[[Any], Tensor]:
        from torchvision import transforms

        crop = transforms.RandomCrop if train else transforms.CenterCrop
        return transforms.Compose(
            [transforms.Resize(round(self.image_size * 8 / 7)), crop(self.image_size), transforms.ToTensor()]
        )


class _Faces(Dataset[tuple[Tensor, int, int]]):
    def __init__(self, folder: Path, rows: list[tuple[str, int, int]], transform: Callable[[Any], Tensor]) -> None:
        self.folder = folder
        self.rows = rows
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        from PIL import Image

        file, target, group = self.rows[index]
        with Image.open(self.folder / file) as image:
            return self.transform(image.convert("RGB")), target, group


def _read(folder: Path) -> tuple[list[str], list[tuple[str, int, list[int]]]]:
    """Names of the attributes, and file, split and attributes (0 or 1) of every image."""
    for name in (_ATTRIBUTES, _PARTITION):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"Expected {folder.resolve()} to hold {name} of CelebA. `prepare_data()` downloads."
            )
    split = dict(line.split() for line in (folder / _PARTITION).read_text().splitlines() if line)
    _, header, *lines = (folder / _ATTRIBUTES).read_text().splitlines()
    rows = []
    for line in lines:
        file, *values = line.split()
        rows.append((file, int(split[file]), [int(value == "1") for value in values]))
    return header.split(), rows
