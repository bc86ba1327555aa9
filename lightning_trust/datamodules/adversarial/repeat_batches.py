"""Every training batch several times in a row, for Free adversarial training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trust.datamodules.wrapped import WrappedDataModule


class RepeatBatches(WrappedDataModule):
    r"""The user's data module, with each training batch served several times in a row.

    An epoch of :math:`B` batches becomes one of :math:`m B`, so a run of :math:`E` epochs is to have
    :math:`\lceil E / m \rceil`: divide ``max_epochs`` and epoch-wise schedules by :math:`m`. Order, augmentation,
    sampler, workers and ranks are as without: a batch is loaded once and handed out as copies, so that a host that
    edits its batch does so from the same start each time. Validation, test and prediction data are the user's own.

    Paper: Adversarial Training for Free! (NeurIPS 2019), which repeats each batch eight times on CIFAR-10 and four
    times on ImageNet. Use it with :class:`~lightning_trust.callbacks.FreeAdversarialTraining`.

    Args:
        datamodule: The user's data module; its ``train_dataloader`` returns one ``DataLoader``.
        replays: How many times :math:`m` each batch is served.

    Raises:
        ValueError: If ``replays`` is not a positive integer.
        MisconfigurationException: If the training data are no single ``DataLoader`` (when training asks for them).

    Example:
        >>> from lightning_trust.datamodules import Digits, RepeatBatches
        >>> data = RepeatBatches(Digits(), replays=8)
        >>> data.setup("fit")
        >>> len(data.train_dataloader()) == 8 * len(data.datamodule.train_dataloader())
        True

    """

    def __init__(self, datamodule: LightningDataModule, replays: int = 8) -> None:
        if not isinstance(replays, int) or isinstance(replays, bool) or replays < 1:
            raise ValueError(f"Expected argument `replays` to be an integer of at least 1, but got {replays!r}.")
        super().__init__(datamodule)
        self.replays = replays

    def train_dataloader(self) -> DataLoader[Any]:
        """The user's training loader, which serves every batch ``replays`` times in a row."""
        loader = copy.copy(self.one_loader(self.datamodule))
        kind: Any = type(loader)
        # a class of the user's loader's own kind, so that Lightning can make it anew with a distributed sampler
        loader.__class__ = _repeating(kind, self.replays)
        # the worker processes of the user's loader, where it keeps some, are not shared
        loader.__dict__["_iterator"] = None
        return loader


@cache
def _repeating(kind: Any, replays: int) -> Any:
    class Repeating(kind):  # type: ignore[misc]
        def __iter__(self) -> _Repeated:
            return _Repeated(super().__iter__(), replays)

        def __len__(self) -> int:
            return replays * super().__len__()

    return Repeating


class _Repeated:
    """Serves each item of an iterator several times.

    No generator: the iterator over the data is to be there, with the random numbers that it draws when it is made, as
    soon as it is asked for.
    """

    def __init__(self, batches: Iterator[Any], replays: int) -> None:
        self.batches = batches
        self.replays = replays
        self.left = 0
        self.batch: Any = None

    def __iter__(self) -> _Repeated:
        return self

    def __next__(self) -> Any:
        if self.left == 0:
            self.batch = next(self.batches)
            self.left = self.replays
        self.left -= 1
        batch = self.batch
        if self.left == 0:
            self.batch = None
            return batch
        return apply_to_collection(batch, Tensor, _copied)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone().pin_memory() if tensor.is_pinned() else tensor.clone()
