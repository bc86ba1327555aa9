"""Small image data sets held in memory, and the data module that splits them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules.split_data_module import SplitDataModule, check_integer

Sample = tuple[Tensor, int]


class ImageRows(Dataset[Sample]):
    r"""Images in memory as bytes, handed out as floats.

    A row is :math:`(x, y)` with :math:`x = \mathrm{transform}(\mathrm{byte} / \mathrm{largest})`, then, where ``mean``
    and ``std`` are given, :math:`x_c \leftarrow (x_c - \mathrm{mean}_c) / \mathrm{std}_c`. ``dataset[i]`` is the row
    ``i``; a DataLoader fetches the rows of a batch at once (``__getitems__``), and its batches are the usual
    ``[inputs, targets]``.

    Args:
        images: Raw images, bytes, shape ``(N, C, H, W)``, from 0 to ``largest``.
        targets: Labels, shape ``(N,)``; kept as int64.
        transform: Called with each image, float32 of shape ``(C, H, W)`` in [0, 1], before the normalisation; gives an
            image of the same kind. It may be replaced at any time: measuring code sets ``dataset.transform = None`` on
            a copy to see the data without augmentation.
        largest: The byte that becomes 1.0.
        mean: Mean per channel to subtract.
        std: Standard deviation per channel to divide by.

    Attributes:
        targets: All labels, int64, shape ``(N,)``.
        transform: The transform, or None.

    Raises:
        ValueError: If the images are not bytes of four dimensions, the numbers of rows differ, or only one of ``mean``
            and ``std`` is given.

    Example:
        >>> import torch
        >>> rows = ImageRows(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([3, 7]))
        >>> image, label = rows[1]
        >>> image.item(), label, len(rows)
        (1.0, 7, 2)

    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        transform: Callable[[Tensor], Tensor] | None = None,
        largest: int = 255,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                "Expected argument `images` to be bytes (torch.uint8) of shape (N, C, H, W),"
                f" but got {images.dtype} of shape {tuple(images.shape)}."
            )
        if targets.shape != images.shape[:1]:
            raise ValueError(
                f"Expected argument `targets` to have shape ({len(images)},) like `images`,"
                f" but got {tuple(targets.shape)}."
            )
        if not 0 < largest < 256:
            raise ValueError(f"Expected argument `largest` to be an integer in [1, 255], but got {largest}.")
        self.space = InputSpace(0.0, 1.0, mean, std)
        self.images = images
        self.targets = targets.long()
        self.transform = transform
        self.largest = largest

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index in [{-len(self)}, {len(self)}), but got {index}.")
        return self.__getitems__([int(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The rows at ``indices``, converted together."""
        rows = torch.as_tensor(indices)
        images = self.images[rows].float() / self.largest
        if self.transform is not None:
            images = torch.stack([self.transform(image) for image in images])
        images = self.space.from_raw(images)
        return list(zip(images.unbind(), self.targets[rows].tolist(), strict=True))


class RandomShiftFlip:
    """Augmentation of small images: a shift by up to ``padding`` pixels, black filled in, and perhaps a mirror image.

    Draws from torch's global generator. Does what torchvision's ``RandomCrop(size, padding)`` and
    ``RandomHorizontalFlip()`` do one after the other, in a fraction of their time.

    Args:
        padding: Largest shift in pixels along each axis, all shifts equally likely.
        flip: Whether to mirror left and right in half of the cases.

    Raises:
        ValueError: If ``padding`` is negative.

    Example:
        >>> import torch
        >>> RandomShiftFlip(padding=2)(torch.ones(1, 28, 28)).shape
        torch.Size([1, 28, 28])

    """

    def __init__(self, padding: int = 2, flip: bool = True) -> None:
        if padding < 0:
            raise ValueError(f"Expected argument `padding` to be zero or a positive integer, but got {padding}.")
        self.padding = padding
        self.flip = flip

    def __call__(self, image: Tensor) -> Tensor:
        """An image ``(C, H, W)`` -> its augmented twin of the same shape."""
        shifts = 2 * self.padding + 1
        draw = int(torch.randint(0, shifts * shifts * 2, ()))  # one draw decides all three, which halves the cost
        rest, mirrored = divmod(draw, 2)
        top, left = divmod(rest, shifts)
        height, width = image.shape[-2:]
        padded = torch.nn.functional.pad(image, (self.padding,) * 4)
        moved = padded[..., top : top + height, left : left + width]
        return moved.flip(-1) if self.flip and mirrored else moved


class ImageRowsDataModule(SplitDataModule):
    """Train, validation and test split of an image data set in memory; a subclass reads the images.

    The validation rows are drawn from the training rows by a permutation that depends on ``seed`` alone, and so are
    the ``train_rows`` kept: fewer training rows are a part of more, and the validation rows stay the same.
    The data sets (:class:`ImageRows`) are there after ``setup``.

    Attributes:
        train_dataset: The training rows.
        val_dataset: The validation rows, without augmentation.
        test_dataset: The test rows, without augmentation.

    """

    #: Names of the classes, in the order of their labels.
    class_names: tuple[str, ...]
    #: Mean and standard deviation of the raw training pixels, per channel.
    mean: tuple[float, ...]
    std: tuple[float, ...]
    #: The byte that becomes 1.0.
    largest: int = 255
    #: What `augment=True` does to a training image.
    augmentation: Callable[[Tensor], Tensor] | None = None

    train_dataset: ImageRows
    val_dataset: ImageRows
    test_dataset: ImageRows

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        train_rows: int | None,
        val_rows: int,
        test_rows: int | None,
        seed: int,
        augment: bool,
        normalise: bool,
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        check_integer("val_rows", val_rows, 0)
        check_integer("seed", seed, 0)
        if train_rows is not None:
            check_integer("train_rows", train_rows, 1)
        if test_rows is not None:
            check_integer("test_rows", test_rows, 1)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_rows = train_rows
        self.val_rows = val_rows
        self.test_rows = test_rows
        self.seed = seed
        self.augment = augment
        self.normalise = normalise

    def read(self, part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """All raw images, bytes of shape ``(N, C, H, W)``, and labels ``(N,)`` of a part of the data set."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_space(self) -> InputSpace:
        """The valid box of raw inputs, with mean and standard deviation where the data arrive normalised."""
        return InputSpace(0.0, 1.0, self.mean, self.std) if self.normalise else InputSpace(0.0, 1.0)

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data set; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        images, targets = self.read("train")
        order = self._permutation(len(images))
        kept = len(images) - self.val_rows if self.train_rows is None else self.train_rows
        if kept < 1 or kept + self.val_rows > len(images):
            raise MisconfigurationException(
                f"Expected arguments `train_rows` and `val_rows` to share the {len(images)} training rows of"
                f" {type(self).__name__}, but got train_rows={self.train_rows} and val_rows={self.val_rows}."
            )
        val = order[: self.val_rows].sort().values
        train = order[self.val_rows : self.val_rows + kept].sort().values
        test_images, test_targets = self.read("test")
        if self.test_rows is not None and self.test_rows > len(test_images):
            raise ValueError(
                f"Expected argument `test_rows` to be at most {len(test_images)}, the test rows of"
                f" {type(self).__name__}, but got {self.test_rows}."
            )
        test = self._permutation(len(test_images))[: self.test_rows].sort().values
        self.train_dataset = self._rows(images[train], targets[train], self.augmentation if self.augment else None)
        self.val_dataset = self._rows(images[val], targets[val])
        self.test_dataset = self._rows(test_images[test], test_targets[test])

    def _permutation(self, rows: int) -> Tensor:
        return torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed))

    def _rows(self, images: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> ImageRows:
        space = self.input_space
        return ImageRows(images, targets, transform, self.largest, space.mean, space.std)
