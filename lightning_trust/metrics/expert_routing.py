"""How a network of experts uses them, and how firmly its router decides, as torchmetrics metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ExpertUtilisation(Metric):
    r"""Which share of the images goes to each expert, how even the shares are, and which classes go where.

    .. math:: f_e = \frac1n \sum_i 1[\arg\max R(x_i) = e], \qquad H = -\sum_e f_e \log f_e

    The entropy is :math:`\log E` where all experts are used alike, and 0 where one is used alone.

    Args:
        num_experts: Number of experts ``E``.
        num_classes: Number of classes ``K``.
        kwargs: Further arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> metric = ExpertUtilisation(num_experts=2, num_classes=3)
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 2.0]]), torch.tensor([0, 1, 1, 2]))
        >>> metric.compute()["share"], metric.compute()["classes"]
        (tensor([0.2500, 0.7500]), tensor([[1, 0],
                [0, 2],
                [0, 1]]))

    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor

    def __init__(self, num_experts: int = 2, num_classes: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("num_experts", num_experts), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        self.num_experts = num_experts
        self.num_classes = num_classes
        self.add_state("counts", default=torch.zeros(num_classes, num_experts, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add images.

        Args:
            scores: Scores of the experts, shape ``(N, E)``.
            targets: Classes, int64, shape ``(N,)``.

        Raises:
            ValueError: If a shape or class does not fit.

        """
        if scores.ndim != 2 or scores.shape[1] != self.num_experts or targets.shape != scores.shape[:1]:
            raise ValueError(
                f"Expected arguments `scores` and `targets` to have shapes (N, {self.num_experts}) and (N,), but got"
                f" {tuple(scores.shape)} and {tuple(targets.shape)}."
            )
        if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < self.num_classes):
            raise ValueError(
                f"Expected argument `targets` to hold classes in [0, {self.num_classes}), but got classes from"
                f" {int(targets.min())} to {int(targets.max())}."
            )
        cells = targets * self.num_experts + scores.argmax(dim=1)
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """``"share"`` ``(E,)``, ``"entropy"`` (in nats) and ``"classes"``, counts ``(K, E)``; NaN without images."""
        share = self.counts.sum(dim=0) / self.counts.sum()
        return {"share": share, "entropy": torch.special.entr(share).sum(), "classes": self.counts.clone()}


class RouterRobustness(Metric):
    r"""Share of images that an attack does not send to another expert.

    .. math:: \frac1n \sum_i 1[\arg\max R(x_i') = \arg\max R(x_i)]

    For the robustness of the router alone, attack it alone: ``PGD(...)(network.route, x, network.route(x).argmax(1))``
    moves images away from their own expert.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = RouterRobustness()
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.5, 1.0], [2.0, 1.0]]))
        >>> metric.compute()
        tensor(0.5000)

    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    same: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("same", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, clean_scores: Tensor, adversarial_scores: Tensor) -> None:
        """Add images.

        Args:
            clean_scores: Scores of the experts, shape ``(N, E)``.
            adversarial_scores: Scores on adversarial inputs, shape ``(N, E)``.

        Raises:
            ValueError: If the shapes differ or are not ``(N, E)``.

        """
        if clean_scores.ndim != 2 or clean_scores.shape != adversarial_scores.shape:
            raise ValueError(
                "Expected arguments `clean_scores` and `adversarial_scores` to have one shape (N, E), but got"
                f" {tuple(clean_scores.shape)} and {tuple(adversarial_scores.shape)}."
            )
        self.same += (clean_scores.argmax(dim=1) == adversarial_scores.argmax(dim=1)).sum()
        self.total += len(clean_scores)

    def compute(self) -> Tensor:
        """The share, in [0, 1]; NaN without images."""
        return self.same / self.total
