"""Counting which source classes a prompted network predicts for the classes of a task, as the prompt is trained."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import sum_over_ranks_
from lightning_trust.core.host import find_network
from lightning_trust.core.passes import evaluate, timed_pass
from lightning_trust.core.step import HostCallback
from lightning_trust.core.training_batches import training_batches
from lightning_trust.core.wrapping import Surrounded, SurroundingCallback, surrounding
from lightning_trust.functional.prompting import count_predictions
from lightning_trust.nn.prompting.label_mapping import LabelMapping
from lightning_trust.nn.prompting.visual_prompt import VisualPrompt


class IterativeLabelMapping(HostCallback):
    r"""Take a :class:`~lightning_trust.nn.LabelMapping` from counts, before training and again every few epochs.

    "Understanding and Improving Visual Prompting: A Label-Mapping Perspective" (CVPR 2023). Training alternates between
    :math:`\min_P L(P, \pi)`, an epoch, and :math:`\pi = \mathrm{frequency}(P)`, one pass over the training data without
    a graph, in eval mode. Counts are summed over all ranks before anything is decided. A mapping of method
    ``"frequency"`` is counted once, before training.

    Logs ``trust/mapping_changed``, the share of target classes whose source classes changed, and
    ``trust/mapping_mass``, the share of the training data whose prediction is one of its class's source classes.

    The training data are read as the run reads them: random augmentation is not taken out.

    Args:
        interval_epochs: Epochs between two counts.
        max_batches: Counts at most so many batches on each rank; all if None.
        batch_spec: Where inputs and targets sit in a batch.
        name: Tells two callbacks of one class apart.

    Raises:
        ValueError: If ``interval_epochs`` is below one, or labels or outputs do not fit the mapping.
        MisconfigurationException: If the run has no mapping that is counted.

    Example:
        >>> IterativeLabelMapping(interval_epochs=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `interval_epochs` to be at least 1, but got 0.

    """

    def __init__(
        self,
        interval_epochs: int = 1,
        max_batches: int | None = None,
        batch_spec: BatchSpec | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        for argument, value in (("interval_epochs", interval_epochs), ("max_batches", max_batches)):
            if value is not None and value < 1:
                raise ValueError(f"Expected argument `{argument}` to be at least 1, but got {value}.")
        self.interval_epochs = interval_epochs
        self.max_batches = max_batches
        self.batch_spec = batch_spec or BatchSpec()
        #: share of target classes whose source classes the last count changed, and of data that it maps rightly
        self.changed, self.mass = 0.0, 0.0

    def begin(self, trainer: Any, host: Any) -> None:
        """Count before training."""
        self.refresh(trainer, host)

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on; the mapping itself is part of what was trained."""
        self.changed, self.mass = float(state["changed"]), float(state["mass"])
        self._part(trainer, host)

    def state(self) -> dict[str, Any]:
        """What the last count found."""
        return {"changed": self.changed, "mass": self.mass}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count again, where it is time."""
        super().on_train_epoch_start(trainer, pl_module)
        epoch = trainer.current_epoch
        _, mapping = self._part(trainer, pl_module)
        if epoch > 0 and epoch % self.interval_epochs == 0 and mapping.method == "iterative":
            self.refresh(trainer, pl_module)
        pl_module.log("trust/mapping_changed", self.changed)
        pl_module.log("trust/mapping_mass", self.mass)

    @torch.no_grad()
    def counts(self, trainer: Any, host: Any) -> Tensor:
        """Predictions of all ranks with the prompt as it is, int64, shape ``(num_source, num_target)``."""
        part, mapping = self._part(trainer, host)
        batches = training_batches(trainer, host, type(self).__name__, "counts predictions", self.max_batches)
        network = self._network(trainer, host)
        counts = torch.zeros(mapping.num_source, mapping.num_target, dtype=torch.int64, device=host.device)
        with timed_pass(host), part.outputs_as_they_are():
            for logits, targets in evaluate(trainer, host, network, batches, self.batch_spec):
                if logits.ndim != 2 or logits.shape[1] != mapping.num_source:
                    raise ValueError(
                        f"Expected the network to give source logits of shape (B, num_source={mapping.num_source}), but"
                        f" got {tuple(logits.shape)}."
                    )
                counts += count_predictions(logits.argmax(dim=1), targets, mapping.num_source, mapping.num_target)
        sum_over_ranks_([counts])
        return counts

    def refresh(self, trainer: Any, host: Any) -> None:
        """Count, and take the mapping from the counts."""
        _, mapping = self._part(trainer, host)
        counts = self.counts(trainer, host)
        self.changed = mapping.fit_counts(counts)
        chosen = counts.T.gather(1, mapping.indices.to(counts.device))
        self.mass = float(chosen.sum()) / max(1.0, float(counts.sum()))

    def _part(self, trainer: Any, host: Any) -> tuple[VisualPrompt, LabelMapping]:
        found = surrounding(trainer, host, VisualPrompt)
        mapping = None if found is None else found[0].mapping
        if not isinstance(mapping, LabelMapping):
            raise MisconfigurationException(
                f"{type(self).__name__} found no LabelMapping: neither a VisualPrompting callback with one nor a"
                " network with one in the host. Pass `mapping=LabelMapping(...)` to VisualPrompting."
            )
        if not mapping.is_counted:
            raise MisconfigurationException(
                f"{type(self).__name__} counts mappings of method 'frequency' or 'iterative', but got"
                f" method='{mapping.method}'. Remove one of the two."
            )
        assert found is not None  # noqa: S101  (it has a mapping)
        return found[0], mapping  # type: ignore[return-value]

    @staticmethod
    def _network(trainer: Any, host: Any) -> nn.Module:
        for callback in trainer.callbacks:
            if isinstance(callback, SurroundingCallback):
                return find_network(host, callback.network)
        return next(module for module in host.modules() if isinstance(module, Surrounded))
