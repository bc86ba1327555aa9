"""Fairness over groups in validation and test, for data whose batches tell the sensitive attribute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_trust.core.batch import BatchSpec, Key
from lightning_trust.core.host import overrides
from lightning_trust.core.step import Attachment, Stage, StepContext, StepTransform
from lightning_trust.core.taps import captured_outputs
from lightning_trust.metrics import DemographicParityGap, EqualizedOddsGap, WorstGroupAccuracy


class GroupCallback(StepTransform):
    """Base of callbacks that know the group of each sample.

    The host's steps get batches without the sensitive attribute, as they would from data without it; Lightning's hooks
    see the whole batch.
    """

    stages: ClassVar[tuple[Stage, ...]] = ("fit", "validate", "test", "predict")

    num_groups: int
    num_classes: int
    sensitive: Key
    keep_sensitive: bool
    _measures: MetricCollection
    # whether a watched step is under way, and whether its batch has lost the sensitive attribute
    _watching: bool
    _stripped: bool

    def watch(self, num_groups: int, num_classes: int, sensitive: Key, keep_sensitive: bool) -> None:
        """Say which groups there are and where a batch tells them."""
        # a binary classifier may have one logit
        classes = max(2, num_classes)
        self._measures = MetricCollection(
            {
                "trust/dp_gap": DemographicParityGap(num_groups, classes),
                "trust/eo_gap": EqualizedOddsGap(num_groups, classes),
                "trust/worst_group_acc": WorstGroupAccuracy(num_groups, classes),
            }
        )
        self.num_groups = num_groups
        self.num_classes = num_classes
        self.sensitive = sensitive
        self.keep_sensitive = keep_sensitive
        self._watching, self._stripped = False, False

    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Watch what the network puts out in validation and test steps."""
        self._watching = False
        for step in ("validation_step", "test_step"):
            if overrides(host, step):
                # outside of the chain, where the batch still tells the group
                attachment.wrap(host, step, self._watched, order=-1)

    def prepare(self, host: Any, batch: Any, ctx: StepContext) -> Any:
        """Hand the host the batch that it knows."""
        # a step may call another on what it was handed
        if self.keep_sensitive or (self._watching and self._stripped):
            return batch
        self._stripped = True
        return without(batch, self.sensitive)

    def groups_of(self, batch: Any) -> Tensor:
        """The group of each sample."""
        try:
            groups = BatchSpec(targets=self.sensitive).targets_of(batch)
        except ValueError as error:
            raise MisconfigurationException(
                f"{type(self).__name__} needs (x, y, z) with the sensitive attribute z at {self.sensitive!r} of a"
                f" batch, but there is none: {error} Pass `sensitive=...`, or data that tell it."
            ) from error
        if not isinstance(groups, Tensor):
            raise MisconfigurationException(
                f"{type(self).__name__} needs the sensitive attribute as a tensor, but at {self.sensitive!r} of the"
                f" batch is a {type(groups).__name__}."
            )
        return groups

    # -- measuring -----------------------------------------------------------------------------------------------------
    def _watched(self, host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        trainer = host.trainer
        measured = trainer.testing or trainer.validating
        if self._watching or not (measured or trainer.sanity_checking):
            return call(*args, **kwargs)
        batch = args[0] if args else kwargs["batch"]
        groups, targets = self.groups_of(batch), self.batch_spec.targets_of(batch)
        self._watching, self._stripped = True, False
        try:
            with captured_outputs(self.network_of(host)) as outputs:
                result = call(*args, **kwargs)
        finally:
            self._watching = False
        if not outputs:
            raise not_called(self, host, "validation and test steps")
        if measured:
            self._measures.update(logits_of(outputs[-1]), targets, groups)
        return result

    def _begin_measuring(self, host: Any) -> None:
        self._measures.to(host.device)
        self._measures.reset()

    def _end_measuring(self, trainer: Any, host: Any) -> None:
        if trainer.sanity_checking or not next(iter(self._measures.values())).update_called:
            return
        try:
            found = self._measures.compute()
        except ValueError as error:
            if not trainer.fast_dev_run:
                raise
            rank_zero_warn(f"A run of one batch does not tell how fair it is: {error}")
        else:
            # counted over all ranks already
            host.log_dict(found)
        self._measures.reset()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        self._begin_measuring(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the measures."""
        self._end_measuring(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        self._begin_measuring(pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the measures."""
        self._end_measuring(trainer, pl_module)


class FairnessEvaluation(GroupCallback):
    """Measures in validation and test how differently a classifier treats the groups of its data.

    Logs ``trust/dp_gap`` (:class:`~lightning_trust.metrics.DemographicParityGap`), ``trust/eo_gap``
    (:class:`~lightning_trust.metrics.EqualizedOddsGap`) and ``trust/worst_group_acc``
    (:class:`~lightning_trust.metrics.WorstGroupAccuracy`) of the network's outputs over all batches and ranks. The
    host is handed batches without the sensitive attribute, so that one made for ``(x, y)`` runs on ``(x, y, z)``.

    :class:`~lightning_trust.callbacks.FairnessReprogramming` and
    :class:`~lightning_trust.callbacks.AdversarialDebiasing` measure the same themselves; this one is for runs without
    them.

    Args:
        num_groups: Number of groups, at least 2.
        num_classes: Number of classes; 1 for a binary classifier with one logit.
        sensitive: Place of the sensitive attribute in a batch: integers ``(N,)``, or zeros and ones ``(N, G)`` where
            groups overlap.
        keep_sensitive: Whether the host's steps get the sensitive attribute as well.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.

    Raises:
        ValueError: If a number is out of its range; at the end of an evaluation whose data hold no sample of a group
            and class (``fast_dev_run`` warns).
        MisconfigurationException: If a batch tells no sensitive attribute, or a step does not call the network.

    Example:
        >>> FairnessEvaluation(num_groups=3, sensitive="gender").num_groups
        3

    """

    def __init__(
        self,
        num_groups: int = 2,
        num_classes: int = 2,
        sensitive: Key = 2,
        keep_sensitive: bool = False,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(batch_spec, network, name)
        self.watch(num_groups, num_classes, sensitive, keep_sensitive)


def without(batch: Any, place: Key) -> Any:
    """A batch of the same type without an entry, where it is one that can be taken out."""
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        if isinstance(place, int) and -len(batch) <= place < len(batch):
            kept = [entry for at, entry in enumerate(batch) if at != place % len(batch)]
            return kept if isinstance(batch, list) else tuple(kept)
    elif isinstance(batch, Mapping) and place in batch:
        changed: Any = copy.copy(batch)
        del changed[place]
        return changed
    return batch


def logits_of(outputs: Any) -> Tensor:
    """The logits among the outputs of a network: the outputs themselves, or those of a model of transformers."""
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if isinstance(outputs, Mapping) and logits is None:
        logits = outputs.get("logits")
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"a {type(outputs).__name__}" if not isinstance(logits, Tensor) else f"shape {tuple(logits.shape)}"
        raise ValueError(f"Expected the network to put out logits of shape (N, K), but got {found}.")
    return logits


def not_called(owner: Any, host: Any, steps: str) -> MisconfigurationException:
    """What to raise where a step leaves the network out."""
    return MisconfigurationException(
        f"{type(owner).__name__} reads the outputs of the {type(owner.network_of(host)).__name__} of"
        f" {type(host).__name__}, but its {steps} did not call it: they use another module, or call"
        " `network.forward(x)` in place of `network(x)`. Pass `network='<name>'` of the module that they call."
    )
