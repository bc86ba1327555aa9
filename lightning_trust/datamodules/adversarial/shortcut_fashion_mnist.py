"""Fashion-MNIST with a planted shortcut: a faint pattern that tells the class in training and nothing elsewhere."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_trust.core.randomness import derived_seed
from lightning_trust.datamodules.fashion_mnist import FashionMNIST
from lightning_trust.datamodules.image_rows import ImageRows


class ShortcutFashionMNIST(FashionMNIST):
    r"""Fashion-MNIST on which every image carries the pattern of a class: a synthetic shortcut on real images.

    .. math:: x' = \mathrm{clip}\big(x + a \, s_c + n\big)

    with a fixed pattern of random signs :math:`s_c` a class, amplitude :math:`a`, and, where asked for, uniform noise
    :math:`n` in the background. With the given probability :math:`c` is the class of the image, else another one.
    Training and validation rows use ``p_train``; test rows use ``p_id``, or ``p_ood`` where ``shifted``: two data
    modules that differ in ``shifted`` alone are the same images at home and at a new site.

    "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", arXiv:1708.07747; the pattern
    is ours.

    Args:
        root: Folder of the files.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        train_rows: How many training rows to keep; None for all that are not for validation.
        val_rows: How many of the 60,000 training rows are for validation.
        test_rows: How many of the 10,000 test rows to keep; None for all.
        seed: Seed of the choice of rows and of the patterns.
        amplitude: Amplitude :math:`a` of the pattern, in [0, 1]; an attack with a larger radius can remove it.
        kind: ``"full"``: all over the image; ``"corner"``: its upper left 8 by 8 pixels.
        p_train: Share of training rows whose pattern is that of their class, in [0, 1].
        p_id: The same of test rows at home.
        p_ood: The same of test rows where shifted; 0.1 is chance.
        shifted: Whether test rows are those of the new site.
        noise: Largest uniform noise on background pixels (those of value 0), in [0, 1].

    Attributes:
        shown: After ``setup``, the class whose pattern each row of ``"train"``, ``"val"`` and ``"test"`` carries: what
            :class:`~lightning_trust.metrics.ShortcutReliance` takes.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> home = ShortcutFashionMNIST(train_rows=100, test_rows=50)
        >>> away = ShortcutFashionMNIST(train_rows=100, test_rows=50, shifted=True)
        >>> for data in (home, away):
        ...     data.prepare_data()
        ...     data.setup()
        >>> bool((home.test_dataset.targets == away.test_dataset.targets).all())
        True

    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        train_rows: int | None = None,
        val_rows: int = 5000,
        test_rows: int | None = None,
        seed: int = 0,
        amplitude: float = 0.08,
        kind: Literal["full", "corner"] = "full",
        p_train: float = 0.95,
        p_id: float = 0.95,
        p_ood: float = 0.1,
        shifted: bool = False,
        noise: float = 0.0,
    ) -> None:
        super().__init__(root, batch_size, num_workers, train_rows, val_rows, test_rows, seed)
        for name, value in (
            ("amplitude", amplitude),
            ("p_train", p_train),
            ("p_id", p_id),
            ("p_ood", p_ood),
            ("noise", noise),
        ):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Expected argument `{name}` to be in [0, 1], but got {value}.")
        if kind not in ("full", "corner"):
            raise ValueError(f"Expected argument `kind` to be 'full' or 'corner', but got {kind!r}.")
        self.amplitude = amplitude
        self.kind = kind
        self.p_train = p_train
        self.p_id = p_id
        self.p_ood = p_ood
        self.shifted = shifted
        self.noise = noise
        self.shown: dict[str, Tensor] = {}

    @property
    def patterns(self) -> Tensor:
        """The pattern of every class: -1, 0 or 1, shape ``(K, 1, 28, 28)``."""
        generator = torch.Generator().manual_seed(derived_seed("pattern", self.seed))
        signs = 2.0 * torch.randint(0, 2, (self.num_classes, 1, 28, 28), generator=generator) - 1.0
        if self.kind == "corner":
            where = torch.zeros(28, 28)
            where[:8, :8] = 1.0
            signs = signs * where
        return signs

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data set, and plant the patterns; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        super().setup(stage)
        share = self.p_ood if self.shifted else self.p_id
        for part, dataset, aligned in (
            ("train", self.train_dataset, self.p_train),
            ("val", self.val_dataset, self.p_train),
            ("test", self.test_dataset, share),
        ):
            self._plant(part, dataset, aligned)

    def _plant(self, part: str, dataset: ImageRows, aligned: float) -> None:
        generator = torch.Generator().manual_seed(derived_seed("shortcut", self.seed, part))
        count, targets = len(dataset), dataset.targets
        # drawn alike whatever the share, so that two sites differ in nothing else
        draw = torch.rand(count, generator=generator)
        other = torch.randint(1, self.num_classes, (count,), generator=generator)
        shown = torch.where(draw < aligned, targets, (targets + other) % self.num_classes)
        self.shown[part] = shown
        images = dataset.images.float() / 255.0
        if self.noise:
            background = self.noise * torch.rand(images.shape, generator=generator)
            images = torch.where(images == 0.0, background, images)
        images = (images + self.amplitude * self.patterns[shown]).clamp(0.0, 1.0)
        dataset.images = (255.0 * images).round().to(torch.uint8)
