"""Fashion-MNIST with captions, for contrastive pre-training of images and texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_trust.datamodules.image_rows import ImageRows
from lightning_trust.datamodules.prompting.rotated_fashion_mnist import RotatedFashionMNIST

CaptionedSample = tuple[Tensor, int, str]
#: What each garment is called, in the order of the labels; the first name is that of the class.
GARMENT_NAMES = (
    ("t shirt/top", "t shirt", "tee", "top"),
    ("trouser", "trousers", "pants"),
    ("pullover", "sweater", "jumper"),
    ("dress", "gown"),
    ("coat", "jacket", "overcoat"),
    ("sandal", "open shoe"),
    ("shirt", "blouse"),
    ("sneaker", "trainer", "running shoe"),
    ("bag", "handbag", "purse"),
    ("ankle boot", "boot", "short boot"),
)
#: What a garment that is turned is called; ``{}`` is its name.
ROTATION_NAMES = {0: "{}", 90: "{} turned to the left", 180: "{} upside down", 270: "{} turned to the right"}
#: Forms of captions: the plain template of CLIP, and what a shop or a photographer would write.
CAPTION_FORMS = (
    "This is a photo of a {}.",
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a picture of a {}.",
    "a low resolution photo of a {}.",
    "a black and white photo of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a close-up photo of the {}.",
    "a {}.",
    "new in the shop: {}",
)


class CaptionedRows(Dataset[CaptionedSample]):
    """Rows of images with a caption each: ``dataset[i]`` is ``(image, label, caption)``.

    Args:
        rows: The images and labels.
        captions: A caption for each row.

    Raises:
        ValueError: If there are not as many captions as rows.

    """

    def __init__(self, rows: ImageRows, captions: Sequence[str]) -> None:
        if len(rows) != len(captions):
            raise ValueError(
                f"Expected argument `captions` to have a text for each of the {len(rows)} rows,"
                f" but got {len(captions)}."
            )
        self.rows = rows
        self.captions = list(captions)

    @property
    def images(self) -> Tensor:
        """All raw images."""
        return self.rows.images

    @property
    def targets(self) -> Tensor:
        """All labels, int64 ``(N,)``."""
        return self.rows.targets

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to an image before the normalisation, or None."""
        return self.rows.transform

    @transform.setter
    def transform(self, transform: Callable[[Tensor], Tensor] | None) -> None:
        self.rows.transform = transform

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> CaptionedSample:
        image, label = self.rows[index]
        return image, label, self.captions[index]

    def __getitems__(self, indices: Sequence[int]) -> list[CaptionedSample]:
        """The rows at ``indices``, converted together."""
        rows = self.rows.__getitems__(indices)
        return [(*row, self.captions[index]) for row, index in zip(rows, indices, strict=True)]


class FashionMNISTCaptions(RotatedFashionMNIST):
    """Fashion-MNIST with a caption for every image, drawn from several names of the garment and forms of a caption.

    What image and text say of each other is the garment and, with several ``rotations``, how it lies: "a picture of a
    boot upside down.". The caption of a row is drawn once, by ``seed``, and stays.

    A batch is ``[inputs, targets, captions]``: inputs float32 ``(B, 1, 28, 28)`` in [0, 1], or normalised; targets
    int64 ``(B,)``, the classes that zero-shot classification is measured by; captions, a list of ``B`` texts. The
    names of the classes are among those in the captions.

    Args:
        rotations: Angles in degrees, multiples of 90, counter-clockwise; each image is turned by one of them, and
            garment and angle make the class.
        forms: Forms of captions, with one slot ``{}``; twelve of them if None.
        root: Folder of the files.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        train_rows: How many training rows to keep; None for all that are not for validation.
        val_rows: How many of the 60,000 training rows are for validation.
        test_rows: How many of the 10,000 test rows to keep; None for all.
        seed: Seed of the choice of rows and of captions.
        augment: Whether training images are shifted by up to two pixels and mirrored at random.
        normalise: Whether to subtract the mean of the training pixels and divide by their standard deviation.

    Raises:
        ValueError: If an angle is no multiple of 90 or comes twice, or a form has not one slot.

    Example:
        >>> data = FashionMNISTCaptions(train_rows=100, batch_size=2)
        >>> data.prepare_data()
        >>> data.setup()
        >>> data.train_dataset.captions[:2]
        ['...', '...']
        >>> inputs, targets, captions = next(iter(data.val_dataloader()))
        >>> inputs.shape, len(captions), data.class_names[:2]
        (torch.Size([2, 1, 28, 28]), 2, ('t shirt/top', 'trouser'))

    """

    train_dataset: CaptionedRows  # type: ignore[assignment]
    val_dataset: CaptionedRows  # type: ignore[assignment]
    test_dataset: CaptionedRows  # type: ignore[assignment]

    def __init__(
        self,
        rotations: Sequence[int] = (0,),
        forms: Sequence[str] | None = None,
        root: str = "data",
        batch_size: int = 256,
        num_workers: int = 0,
        train_rows: int | None = None,
        val_rows: int = 5000,
        test_rows: int | None = None,
        seed: int = 0,
        augment: bool = False,
        normalise: bool = False,
    ) -> None:
        super().__init__(
            rotations, root, batch_size, num_workers, train_rows, val_rows, test_rows, seed, augment, normalise
        )
        self.forms = CAPTION_FORMS if forms is None else tuple(forms)
        bad = [form for form in self.forms if form.count("{}") != 1]
        if bad or not self.forms:
            raise ValueError(
                "Expected argument `forms` to hold texts with one slot '{}' for the name of a garment, but got"
                f" {bad[0] if bad else list(self.forms)!r}."
            )
        self._names = [
            [ROTATION_NAMES[angle].replace("{}", name) for name in names]
            for angle in self.rotations
            for names in GARMENT_NAMES
        ]
        self.class_names = tuple(names[0] for names in self._names)

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data set, and draw the captions; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        super().setup(stage)
        for part in ("train_dataset", "val_dataset", "test_dataset"):
            rows: ImageRows = getattr(self, part)
            setattr(self, part, CaptionedRows(rows, self._captions(rows.targets)))

    def _captions(self, targets: Tensor) -> list[str]:
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.randint(2**31, (len(targets), 2), generator=generator).tolist()
        texts = []
        for target, (form, name) in zip(targets.tolist(), draws, strict=True):
            names = self._names[target]
            texts.append(self.forms[form % len(self.forms)].replace("{}", names[name % len(names)]))
        return texts
