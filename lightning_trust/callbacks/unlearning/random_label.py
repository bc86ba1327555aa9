"""Unlearning by training the forget set on random labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.callbacks.unlearning.unlearner import Unlearner, check_logits, find_split, first_of
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.passes import evaluate, transferred
from lightning_trust.core.randomness import RandomStreams, keyed_bits, untouched_random_state
from lightning_trust.core.step import Claim, StepContext, StepTransform
from lightning_trust.datamodules.unlearning.forget_split import Feed
from lightning_trust.functional.unlearning.random_label import random_labels

Mode = Literal["mixed", "sequential"]


class RandomLabel(Unlearner, StepTransform):
    r"""Train the rows to be forgotten on random labels, together with the retain set.

    .. math::
        \min_\theta \mathbb{E}_{x \in D_f} \, \ell(f(x; \theta), y') +
        \alpha \, \mathbb{E}_{(x, y) \in D_r} \, \ell(f(x; \theta), y)

    with :math:`y'` uniform over the classes, drawn anew every epoch, keyed by the row's number in the training set:
    the same on any number of ranks and after a resume.

    Papers: Eternal Sunshine of the Spotless Net (CVPR 2020); as in SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation (ICLR 2024), of which it is the case
    without a mask.

    Args:
        mode: ``"mixed"``: rows of both sets shuffled together. ``"sequential"``: in every epoch first all batches to
            forget, then all batches to retain.
        exclude_true_label: Whether :math:`y' \ne y` (the paper); its code, and the default, draws over all classes.
        alpha: Weight of the retain loss; other than 1 only in sequential mode, where it scales the loss of the
            retain batches (in separate steps it acts as their learning rate).
        num_classes: Number of classes; what the network puts out if None.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of the labels; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If ``mode`` is another word, ``alpha`` is not positive, ``num_classes`` is below 2 (at once); if
            the network puts out no logits or the targets are no class labels (when the fit starts).
        MisconfigurationException: If ``alpha`` is other than 1 in mixed mode.

    Example:
        >>> RandomLabel(mode="sequential").current_feed()
        'forget_then_retain'

    """

    claims: ClassVar[tuple[Claim, ...]] = (*Unlearner.claims, "labels", "loss")

    def __init__(
        self,
        mode: Mode = "mixed",
        exclude_true_label: bool = False,
        alpha: float = 1.0,
        num_classes: int | None = None,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_spec=batch_spec, network=network, name=name, seed=seed)
        if mode not in ("mixed", "sequential"):
            raise ValueError(f"Expected argument `mode` to be 'mixed' or 'sequential', but got {mode!r}.")
        if not alpha > 0.0:
            raise ValueError(f"Expected argument `alpha` to be positive, but got {alpha}.")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"Expected argument `num_classes` to be at least 2, but got {num_classes}.")
        if alpha != 1.0 and mode == "mixed":
            raise MisconfigurationException(
                f"{type(self).__name__}(alpha={alpha}) weights the batches of the retain set, but mode='mixed' has rows"
                " of both sets in one batch. Use mode='sequential', or alpha=1."
            )
        self.mode = mode
        self.exclude_true_label = exclude_true_label
        self.alpha = alpha
        self.num_classes = num_classes
        self._classes = num_classes or 0

    def current_feed(self) -> Feed:
        """What this callback trains on."""
        return "mixed" if self.mode == "mixed" else "forget_then_retain"

    @property
    def changes_loss(self) -> bool:
        """Whether the loss is weighted."""
        return self.alpha != 1.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the classes, and look at the labels of a first batch."""
        if self.attachment is not None:
            self._classes = self._count_classes(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def _count_classes(self, trainer: Any, host: Any) -> int:
        owner = type(self).__name__
        loader = find_split(trainer, owner).forget_dataloader()
        if self.num_classes is None:
            outputs, targets = first_of(evaluate(trainer, host, self.network_of(host), loader, self.batch_spec))
            check_logits(owner, outputs)
            classes = outputs.shape[1]
        else:
            classes = self.num_classes
            with untouched_random_state():
                targets = self.batch_spec.targets_of(first_of(transferred(trainer, host, loader)))
        if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(
                f"Expected the targets of a batch to be integer class labels of shape (N,), because {owner} draws"
                f" others, but got {targets.dtype} of shape {tuple(targets.shape)}."
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"Expected the targets of a batch to be classes in [0, {classes}), of which {owner} draws others, but"
                f" got classes from {low} to {high}."
            )
        return classes

    def prepare(self, host: Any, batch: Any, ctx: StepContext) -> Any:
        """Give the rows to be forgotten random labels."""
        split = find_split(ctx.trainer, type(self).__name__)
        rows = split.rows(ctx.batch_idx)
        if not bool(rows.any()):
            return batch
        targets = self.batch_spec.targets_of(batch)
        # a run has one unlearning method: those that draw labels draw the same, with a mask or without
        streams = RandomStreams(self.random.seed, RandomLabel.__qualname__)
        seed = streams.sample_seed("labels", ctx.trainer.current_epoch)
        draws = keyed_bits(seed, split.indices(ctx.batch_idx)).to(targets.device)
        labels = random_labels(targets, draws, self._classes, self.exclude_true_label)
        return self.batch_spec.replace(batch, targets=torch.where(rows.to(targets.device), labels, targets))

    def loss(self, host: Any, step: Callable[[Any], Tensor], batch: Any, ctx: StepContext) -> Tensor:
        """Weight the loss of a retain batch."""
        rows = find_split(ctx.trainer, type(self).__name__).rows(ctx.batch_idx)
        return step(batch) if bool(rows.any()) else self.alpha * step(batch)
