"""Fairness over groups as torchmetrics metrics: demographic parity, equalised odds, accuracy of the worst cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class _GroupConfusion(Metric):
    """Counts of (class, predicted class) in every group and over all data; what is computed is summed over ranks."""

    is_differentiable = False
    full_state_update = False
    counts: Tensor
    overall: Tensor

    def __init__(self, num_groups: int = 2, num_classes: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("num_groups", num_groups), ("num_classes", num_classes)):
            if value < 2:
                raise ValueError(f"Expected argument `{name}` to be an integer of at least 2, but got {value}.")
        self.num_groups = num_groups
        self.num_classes = num_classes
        cells = (num_classes, num_classes)
        # sums of counts: a mean of gaps of batches would be another number
        self.add_state("counts", torch.zeros(num_groups, *cells, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("overall", torch.zeros(cells, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, targets: Tensor, groups: Tensor) -> None:
        """Add samples.

        Args:
            preds: Logits ``(N, K)``, or predicted classes, integer ``(N,)``; for two classes also one logit a sample,
                floating ``(N,)`` or ``(N, 1)``, of which a positive one is class 1.
            targets: Classes, integer ``(N,)``.
            groups: The group of each sample, integer ``(N,)``, or, where groups overlap, its membership of each, of
                zeros and ones, ``(N, G)``.

        Raises:
            ValueError: If shapes or types do not fit, or a class or group is out of range.

        """
        predicted = self._predicted(preds)
        if targets.shape != predicted.shape or targets.is_floating_point():
            raise ValueError(
                f"Expected argument `targets` to be integer classes of shape {tuple(predicted.shape)}, but got"
                f" {targets.dtype} of shape {tuple(targets.shape)}."
            )
        members = self._members(groups, len(predicted))
        for name, values in (("preds", predicted), ("targets", targets)):
            self._check_range(name, values, self.num_classes, "classes")
        cells = self.num_classes**2
        cell = targets.long() * self.num_classes + predicted
        whole = torch.bincount(cell, minlength=cells)
        self.overall += whole.view_as(self.overall)
        for group in range(self.num_groups):
            self.counts[group] += torch.bincount(cell[members[:, group]], minlength=cells).view_as(self.overall)

    def _predicted(self, preds: Tensor) -> Tensor:
        if not preds.is_floating_point():
            if preds.ndim == 1:
                return preds.long()
        elif preds.ndim == 2 and preds.shape[1] == self.num_classes:
            return preds.argmax(dim=1)
        elif self.num_classes == 2 and (preds.ndim == 1 or (preds.ndim == 2 and preds.shape[1] == 1)):
            return (preds.flatten() > 0.0).long()
        raise ValueError(
            f"Expected argument `preds` to be logits of shape (N, {self.num_classes}) or integer classes of shape (N,),"
            f" but got {preds.dtype} of shape {tuple(preds.shape)}."
        )

    def _members(self, groups: Tensor, rows: int) -> Tensor:
        if groups.shape == (rows,) and not groups.is_floating_point():
            self._check_range("groups", groups, self.num_groups, "groups")
            return torch.nn.functional.one_hot(groups.long(), self.num_groups).bool()
        if groups.shape == (rows, self.num_groups):
            if bool(((groups != 0) & (groups != 1)).any()):
                raise ValueError("Expected argument `groups` of overlapping groups to hold zeros and ones only.")
            return groups.bool()
        raise ValueError(
            f"Expected argument `groups` to be integers of shape ({rows},), or zeros and ones of shape ({rows},"
            f" {self.num_groups}), but got {groups.dtype} of shape {tuple(groups.shape)}."
        )

    @staticmethod
    def _check_range(name: str, values: Tensor, limit: int, what: str) -> None:
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise ValueError(
                f"Expected argument `{name}` to be in [0, {limit}), the number of {what}, but got values from"
                f" {int(values.min())} to {int(values.max())}."
            )

    def _check_all_there(self, rows: Tensor, what: str) -> None:
        """Refuse groups, shape ``(G,)``, or groups of a class, ``(G, K)``, without a sample."""
        missing = (rows == 0).nonzero().tolist()
        if missing:
            where = ", ".join(
                f"group {place[0]}" + (f" with class {place[1]}" if len(place) > 1 else "") for place in missing[:5]
            )
            raise ValueError(
                f"{type(self).__name__} needs {what}, but the {int(self.overall.sum())} samples that it has seen have"
                f" none of {where}. Evaluate on data that hold every group, or state the number of groups that there"
                " are."
            )


class DemographicParityGap(_GroupConfusion):
    r"""How much the rate of a prediction differs between groups: 0 for predictions that do not depend on the group.

    .. math:: \frac1K \sum_k \frac1G \sum_g \big| \Pr[\hat y = k] - \Pr[\hat y = k \mid g] \big|

    the mean absolute deviation of the groups' rates from that of all data, and the mean over the classes; for two
    classes both terms are equal, and it is the gap of the positive rate. For two groups that share the data, in parts
    of any size, it is half of the difference between their rates (fairlearn's ``demographic_parity_difference``).

    Paper: Fairness Reprogramming (NeurIPS 2022).

    Args:
        num_groups: Number of groups, at least 2.
        num_classes: Number of classes, at least 2.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is out of its range; in ``compute``, if a group has no sample.

    Example:
        >>> metric = DemographicParityGap(num_groups=2)
        >>> metric.update(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 0, 1]))
        >>> metric.compute() # rates 2/3 and 0, over all 1/2
        tensor(0.3333)

    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The gap, in [0, 1]."""
        rows = self.counts.sum(dim=(1, 2))
        self._check_all_there(rows, "samples of every group")
        rates = self.counts.sum(dim=1) / rows[:, None]
        return (rates - self.overall.sum(dim=0) / self.overall.sum()).abs().mean()


class EqualizedOddsGap(_GroupConfusion):
    r"""How much the rates of errors differ between groups: 0 where predictions depend on the group by the class only.

    .. math:: \frac1K \sum_k \frac{\mathrm{ED}(\mathrm{FPR}_k) + \mathrm{ED}(\mathrm{FNR}_k)}2, \qquad
        \mathrm{ED}(r) = \frac1G \sum_g | r - r_g |

    with the rates of false positives and false negatives of each class against the rest; for two classes all terms
    :math:`k` are equal. For two groups that share the data it is a quarter of the sum of both differences.

    Paper: Fairness Reprogramming (NeurIPS 2022).

    Args:
        num_groups: Number of groups, at least 2.
        num_classes: Number of classes, at least 2.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is out of its range; in ``compute``, if a group has no sample of a class.

    Example:
        >>> metric = EqualizedOddsGap(num_groups=2)
        >>> metric.update(torch.tensor([1, 0, 0, 0]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute() # false negatives 0 and 1, over all 1/2; no false positives
        tensor(0.2500)

    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The gap, in [0, 1]."""
        self._check_all_there(self.counts.sum(dim=2), "samples of every class in every group")
        false_positives, false_negatives = _error_rates(self.counts)
        over_all = _error_rates(self.overall)
        return ((false_positives - over_all[0]).abs().mean() + (false_negatives - over_all[1]).abs().mean()) / 2.0


class WorstGroupAccuracy(_GroupConfusion):
    r"""Accuracy where it is lowest: the minimum over pairs of group and class.

    .. math:: \min_{g, y} \Pr[\hat y = y \mid g, y]

    Paper: Distributionally Robust Neural Networks for Group Shifts (ICLR 2020, arXiv:1911.08731).

    Args:
        num_groups: Number of groups, at least 2.
        num_classes: Number of classes, at least 2.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is out of its range; in ``compute``, if a group has no sample of a class.

    Example:
        >>> metric = WorstGroupAccuracy(num_groups=2)
        >>> metric.update(torch.tensor([1, 0, 0, 0]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.)

    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The accuracy, in [0, 1]."""
        rows = self.counts.sum(dim=2)
        self._check_all_there(rows, "samples of every class in every group")
        return (self.counts.diagonal(dim1=1, dim2=2) / rows).min()


def _error_rates(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rates of false positives and false negatives of each class against the rest: ``(..., K, K)`` -> ``(..., K)``."""
    of_class, right = counts.sum(dim=-1), counts.diagonal(dim1=-2, dim2=-1)
    others = counts.sum(dim=(-2, -1))[..., None] - of_class
    return (counts.sum(dim=-2) - right) / others, (of_class - right) / of_class
