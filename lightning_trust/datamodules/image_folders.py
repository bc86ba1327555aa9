"""Images in folders, one a class: ImageNet, and any other data set that lies so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules.split_data_module import SplitDataModule

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolders(SplitDataModule):
    """Train, validation and test images in folders with a folder for each class, read by torchvision.

    ``root/train/<class>/*.jpg`` and likewise ``val`` and ``test``; labels are the places of the classes' names in
    alphabetical order. This is how ImageNet is commonly laid out.

    A batch is ``[inputs, targets]``: inputs float32 ``(B, 3, S, S)``, normalised, or in [0, 1]; targets int64 ``(B,)``.

    Args:
        root: The folder.
        image_size: Side :math:`S` of the images in pixels.
        resize: Length of the shorter side before the middle is cut out, where images are not augmented. If None, images
            are resized to a square of ``image_size`` and nothing is cut off.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        augment: Whether training images are cut out at random, resized and mirrored.
        normalise: Whether to subtract ImageNet's mean per channel and divide by its standard deviation.
        train: Name of the folder of training images.
        val: Name of the folder of validation images; None for no validation.
        test: Name of the folder of test images; None to test on those of validation.

    Raises:
        ValueError: If a number is out of its range.
        MisconfigurationException: In ``setup``, if there is no such folder.

    Example:
        >>> ImageFolders("data/imagenet", batch_size=128).input_space.mean
        (0.485, 0.456, 0.406)

    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 224,
        resize: int | None = 256,
        batch_size: int = 128,
        num_workers: int = 8,
        augment: bool = True,
        normalise: bool = True,
        train: str = "train",
        val: str | None = "val",
        test: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"Expected argument `{name}` to be an integer of at least {least}, but got {value}.")
        if resize is not None and resize < image_size:
            raise ValueError(
                f"Expected argument `resize` to be at least `image_size` ({image_size}), but got {resize}."
            )
        self.root = root
        self.image_size = image_size
        self.resize = resize
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.normalise = normalise
        self.folders = {"train": train, "val": val, "test": test or val}

    @property
    def input_space(self) -> InputSpace:
        """The valid box of raw inputs, with mean and standard deviation where the data arrive normalised."""
        return InputSpace(0.0, 1.0, _MEAN, _STD) if self.normalise else InputSpace(0.0, 1.0)

    @property
    def eval_transform(self) -> Any:
        """What images go through where they are measured rather than trained on."""
        from torchvision import transforms

        size = [self.image_size, self.image_size]
        shape = (
            [transforms.Resize(size)]
            if self.resize is None
            else [transforms.Resize(self.resize), transforms.CenterCrop(self.image_size)]
        )
        return transforms.Compose([*shape, *self._as_tensor()])

    def _as_tensor(self) -> list[Any]:
        from torchvision import transforms

        return [transforms.ToTensor(), *([transforms.Normalize(_MEAN, _STD)] if self.normalise else [])]

    def setup(self, stage: str | None = None) -> None:
        """List the images."""
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        augmenting = [transforms.RandomResizedCrop(self.image_size), transforms.RandomHorizontalFlip()]
        augmented = transforms.Compose([*augmenting, *self._as_tensor()])
        for part, name in self.folders.items():
            if name is None:
                continue
            folder = Path(self.root, name)
            if not folder.is_dir():
                raise MisconfigurationException(
                    f"Expected argument `{part}` of ImageFolders to name a folder of folders of images in"
                    f" {self.root}, but {folder} is none."
                )
            transform = augmented if part == "train" and self.augment else self.eval_transform
            setattr(self, f"{part}_dataset", ImageFolder(str(folder), transform))
