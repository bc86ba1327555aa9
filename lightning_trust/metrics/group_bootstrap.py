"""Any metric with an interval over groups of samples, such as images of one patient."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_trust.functional.adversarial.group_bootstrap import check_bootstrap, group_bootstrap_interval


class GroupBootstrap(Metric):
    r"""A metric and its bootstrap interval over patients, or other groups of samples that belong together.

    Whole groups are drawn with replacement, out of all data; see
    :func:`~lightning_trust.functional.adversarial.group_bootstrap_interval`. (torchmetrics' ``BootStrapper`` resamples
    the rows of each batch: its intervals are too narrow where a patient has several images.)

    Paper: Bootstrap Methods: Another Look at the Jackknife (Annals of Statistics 1979).

    Args:
        metric: What to measure: updated with ``(preds, targets)``, one number. It is copied.
        resamples: How often to draw.
        confidence: Probability that the interval holds the true figure, in (0, 1).
        seed: Seed of the draws; all ranks draw alike.
        kwargs: Further arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of its range or ``metric`` is none.

    Warns:
        UserWarning: If resamples are left out because the metric is NaN there.

    Example:
        >>> from torchmetrics.classification import BinaryAccuracy
        >>> metric = GroupBootstrap(BinaryAccuracy())
        >>> patients = torch.arange(40) // 2  # two images each
        >>> metric.update((torch.arange(40) % 5 > 0).long(), torch.ones(40, dtype=torch.int64), patients)
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'value': 0.8, 'low': 0.7, 'high': 0.9}

    """

    is_differentiable = False
    full_state_update = False
    preds: list[Tensor]
    targets: list[Tensor]
    groups: list[Tensor]

    def __init__(
        self, metric: Metric, resamples: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(metric, Metric):
            raise ValueError(
                f"Expected argument `metric` to be a torchmetrics.Metric, but got {type(metric).__name__}."
            )
        check_bootstrap(resamples, confidence)
        self.metric = copy.deepcopy(metric)
        # it sees the rows of all ranks already
        self.metric.sync_on_compute = False
        self.resamples = resamples
        self.confidence = confidence
        self.seed = seed
        for name in ("preds", "targets", "groups"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, targets: Tensor, groups: Tensor) -> None:
        """Add samples.

        Args:
            preds: As the metric takes them, shape ``(N, ...)``.
            targets: As the metric takes them, shape ``(N, ...)``.
            groups: The group of each sample, such as a number of its patient, integers, shape ``(N,)``: the same in
                all batches and on all ranks.

        Raises:
            ValueError: If the shapes do not fit.

        """
        if groups.ndim != 1 or groups.is_floating_point() or not len(preds) == len(targets) == len(groups):
            raise ValueError(
                "Expected arguments `preds`, `targets` and `groups` to have a row for each sample, and `groups` to be"
                f" integers of shape (N,), but got shapes {tuple(preds.shape)}, {tuple(targets.shape)} and"
                f" {tuple(groups.shape)} of {groups.dtype}."
            )
        self.preds.append(preds.detach())
        self.targets.append(targets)
        self.groups.append(groups.long())

    def compute(self) -> dict[str, Tensor]:
        """``"value"`` of all samples, ``"low"`` and ``"high"``; NaN ends with fewer than two groups."""
        if not len(self.preds):
            return {name: torch.tensor(float("nan"), device=self.device) for name in ("value", "low", "high")}
        preds, targets, groups = (dim_zero_cat(part) for part in (self.preds, self.targets, self.groups))

        def figure(rows: Tensor) -> float:
            rows = rows.to(preds.device)
            self.metric.reset()
            self.metric.update(preds[rows], targets[rows])
            value = self.metric.compute()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError(f"Expected argument `metric` to compute one number, but got {value}.")
            return float(value)

        value = figure(torch.arange(len(preds)))
        low, high = group_bootstrap_interval(figure, groups, self.resamples, self.confidence, self.seed)
        self.metric.reset()
        return {
            name: torch.tensor(number, device=self.device)
            for name, number in (("value", value), ("low", low), ("high", high))
        }
