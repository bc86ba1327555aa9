"""What unlearning callbacks share: the split of the run and what training gets from it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any, ClassVar, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.core.step import Attachment, Claim, HostCallback
from lightning_trust.datamodules.unlearning.forget_split import Feed, ForgetSplit

T = TypeVar("T")


def find_split(trainer: Any, owner: str) -> ForgetSplit:
    """The :class:`~lightning_trust.datamodules.ForgetSplit` of a run.

    Raises:
        MisconfigurationException: If the run's data module is none.

    """
    split = getattr(trainer, "datamodule", None)
    if not isinstance(split, ForgetSplit):
        found = "no data module" if split is None else type(split).__name__
        raise MisconfigurationException(
            f"{owner} needs to know what is to be forgotten, but the run has {found}. Pass"
            " `datamodule=ForgetSplit(your_datamodule, ForgetRandom(fraction=0.1))` to the Trainer, or"
            " `data_wrapper: {class_path: ForgetSplit, ...}` in YAML."
        )
    return split


def first_of(batches: Generator[T, None, None]) -> T:
    """The first of what a pass yields; the pass ends there, and puts back what it changed."""
    with closing(batches):
        return next(batches)


def check_logits(owner: str, outputs: Any) -> None:
    """Refuse what a network puts out if it is no batch of logits.

    Raises:
        ValueError: Naming the shape and the argument that helps.

    """
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or not outputs.is_floating_point():
        found = (
            f"{outputs.dtype} of shape {tuple(outputs.shape)}"
            if isinstance(outputs, Tensor)
            else f"a {type(outputs).__name__}"
        )
        raise ValueError(
            f"Expected the network to put out logits of shape (N, K), because {owner} classifies with them, but got"
            f" {found}. Name the part of the host that gives logits with `network`."
        )


class Unlearner(HostCallback):
    """Base of callbacks that make a trained model forget; a run has one."""

    claims: ClassVar[tuple[Claim, ...]] = ("unlearning", "data_order")
    feed: ClassVar[Feed] = "retain"

    def current_feed(self) -> Feed:
        """What this callback trains on."""
        return self.feed

    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Ask the split for the feed of this method."""
        super().attach(trainer, host, attachment)
        find_split(trainer, type(self).__name__).request_feed(self.current_feed(), type(self).__name__)
