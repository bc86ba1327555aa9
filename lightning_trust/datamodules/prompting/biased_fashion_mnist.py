"""Fashion-MNIST on a tinted ground: a sensitive attribute that training data mix up with the class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.core.randomness import derived_seed
from lightning_trust.datamodules.fashion_mnist import FashionMNIST
from lightning_trust.datamodules.image_rows import ImageRows

Part = Literal["base", "tuning"]
# T-shirt/top, pullover, coat, shirt
_UPPER_BODY = (0, 2, 4, 6)
_RED_AND_GREEN = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


class GroupedImageRows(ImageRows):
    """Images whose rows tell a group as well: ``(image, class, group)``.

    Args:
        images: Raw images, bytes, shape ``(N, C, H, W)``.
        targets: Classes, shape ``(N,)``.
        groups: Groups, shape ``(N,)``.

    """

    def __init__(self, images: Tensor, targets: Tensor, groups: Tensor) -> None:
        super().__init__(images, targets)
        self.groups = groups.long()

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The rows at ``indices``, converted together."""
        rows = torch.as_tensor(indices)
        pairs = super().__getitems__(indices)
        return [(*pair, group) for pair, group in zip(pairs, self.groups[rows].tolist(), strict=True)]


class BiasedFashionMNIST(FashionMNIST):
    r"""Is it for the upper body? Fashion-MNIST in colour, on a ground that is red or green.

    .. math:: x_c = g + (1 - g) \, t \, k_{zc}

    with the grey value :math:`g`, the strength :math:`t` of the tint and its colour :math:`k_z`: red for group 0, green
    for group 1. The class is 1 for T-shirts, pullovers, coats and shirts (40 % of the images), else 0. In a share of
    each class's rows, ``p_train``, the group equals the class: a classifier that is trained on them leans on the tint.
    Validation and test rows have ``p_eval``: at 0.5 the tint says nothing.

    There are two disjoint parts of training rows: ``"base"``, on which a classifier is trained, and ``"tuning"``, on
    which it is made fair.

    "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", arXiv:1708.07747; the tint is
    ours. A batch is ``[inputs, targets, groups]``: inputs float32 ``(B, 3, 28, 28)`` in [0, 1], targets and groups
    int64 ``(B,)``.

    Args:
        root: Folder of the files.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        part: ``"base"`` or ``"tuning"``.
        train_rows: How many rows of the part to keep; None for all: ``base_rows``, or what is left for tuning.
        base_rows: Size of the part ``"base"``.
        val_rows: How many of the 60,000 training rows are for validation.
        test_rows: How many of the 10,000 test rows to keep; None for all.
        seed: Seed of the choice of rows and groups.
        p_train: Share of the part's rows whose group is their class, in [0, 1].
        p_eval: The same of validation and test rows.
        tint: Strength :math:`t` in [0, 1].

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If there are fewer rows than are asked for.

    Example:
        >>> data = BiasedFashionMNIST(part="tuning", train_rows=100, val_rows=50, test_rows=50)
        >>> data.prepare_data()
        >>> data.setup()
        >>> inputs, targets, groups = next(iter(data.train_dataloader()))
        >>> inputs.shape, (targets == groups).float().mean()
        (torch.Size([100, 3, 28, 28]), tensor(0.9000))

    """

    class_names = ("other", "upper body")
    #: Names of the groups, in their order.
    group_names = ("red", "green")
    num_groups = 2

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        part: Part = "base",
        train_rows: int | None = None,
        base_rows: int = 20000,
        val_rows: int = 5000,
        test_rows: int | None = None,
        seed: int = 0,
        p_train: float = 0.9,
        p_eval: float = 0.5,
        tint: float = 0.5,
    ) -> None:
        super().__init__(root, batch_size, num_workers, train_rows, val_rows, test_rows, seed)
        if part not in get_args(Part):
            raise ValueError(f"Expected argument `part` to be 'base' or 'tuning', but got {part!r}.")
        for name, value in (("p_train", p_train), ("p_eval", p_eval), ("tint", tint)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Expected argument `{name}` to be in [0, 1], but got {value}.")
        if base_rows < 1:
            raise ValueError(f"Expected argument `base_rows` to be a positive integer, but got {base_rows}.")
        self.part: Part = part
        self.base_rows = base_rows
        self.p_train = p_train
        self.p_eval = p_eval
        self.tint = tint

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tint the data set; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        images, targets = self.read("train")
        order = self._permutation(len(images))
        first = self.val_rows + (self.base_rows if self.part == "tuning" else 0)
        last = self.val_rows + self.base_rows if self.part == "base" else len(images)
        kept = last - first if self.train_rows is None else self.train_rows
        if kept < 1 or first + kept > min(last, len(images)):
            raise MisconfigurationException(
                f"Expected arguments `val_rows`, `base_rows` and `train_rows` to leave rows for part='{self.part}' of"
                f" the {len(images)} training rows, but got val_rows={self.val_rows}, base_rows={self.base_rows} and"
                f" train_rows={self.train_rows}."
            )
        test_images, test_targets = self.read("test")
        if self.test_rows is not None and self.test_rows > len(test_images):
            raise ValueError(
                f"Expected argument `test_rows` to be at most {len(test_images)}, the test rows of"
                f" {type(self).__name__}, but got {self.test_rows}."
            )
        train, val = order[first : first + kept].sort().values, order[: self.val_rows].sort().values
        test = self._permutation(len(test_images))[: self.test_rows].sort().values
        self.train_dataset = self._tinted(self.part, images[train], targets[train], self.p_train)
        self.val_dataset = self._tinted("val", images[val], targets[val], self.p_eval)
        self.test_dataset = self._tinted("test", test_images[test], test_targets[test], self.p_eval)

    def _tinted(self, part: str, images: Tensor, labels: Tensor, share: float) -> GroupedImageRows:
        generator = torch.Generator().manual_seed(derived_seed("tint", self.seed, part))
        targets = torch.isin(labels, torch.tensor(_UPPER_BODY)).long()
        groups = 1 - targets
        for target in range(2):
            rows = (targets == target).nonzero().flatten()
            # exactly the share, so that small parts have every group
            agreeing = rows[torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]]
            groups[agreeing] = target
        grey = images.float() / 255.0
        colours = torch.tensor(_RED_AND_GREEN)[groups][:, :, None, None]
        tinted = grey + (1.0 - grey) * self.tint * colours
        return GroupedImageRows((255.0 * tinted).round().to(torch.uint8), targets, groups)
