"""MIA-efficacy as a torchmetrics metric."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_trust.functional.unlearning.membership_inference import (
    Feature,
    check_feature,
    membership_feature,
    membership_inference,
)


class MembershipInference(Metric):
    r"""MIA-efficacy: the share of forgotten rows that an attacker takes for non-members, in percent.

    The attack and the features are those of
    :func:`~lightning_trust.functional.unlearning.membership_inference`.

    Paper: Model Sparsity Can Simplify Machine Unlearning (NeurIPS 2023).

    Args:
        feature: What the attacker looks at.
        max_rows: At most so many rows a side are used.
        seed: Seed of their draw.

    Raises:
        ValueError: If ``max_rows`` is below 1 or ``feature`` is another word.

    Example:
        >>> metric = MembershipInference()
        >>> sure, unsure = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.3, 0.7]])
        >>> label = torch.zeros(8, dtype=torch.long)
        >>> metric.update(sure.expand(8, 2), label, "retain")
        >>> metric.update(unsure.expand(8, 2), label, "test")
        >>> metric.update(unsure.expand(8, 2), label, "forget")
        >>> metric.compute()
        tensor(100.)

    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    retain: list[Tensor]
    test: list[Tensor]
    forget: list[Tensor]

    def __init__(self, feature: Feature = "confidence", max_rows: int = 2000, seed: int = 0) -> None:
        super().__init__()
        check_feature(feature)
        if max_rows < 1:
            raise ValueError(f"Expected argument `max_rows` to be at least 1, but got {max_rows}.")
        self.feature = feature
        self.max_rows = max_rows
        self.seed = seed
        for part in ("retain", "test", "forget"):
            self.add_state(part, default=[], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, targets: Tensor, part: Literal["retain", "test", "forget"]) -> None:
        """Add rows of one part.

        Args:
            probabilities: Softmax outputs, shape ``(N, K)``.
            targets: True labels, shape ``(N,)``.
            part: Which set the rows belong to.

        """
        if part not in ("retain", "test", "forget"):
            raise ValueError(f"Expected argument `part` to be 'retain', 'test' or 'forget', but got {part!r}.")
        getattr(self, part).append(membership_feature(probabilities, targets, self.feature))

    def compute(self) -> Tensor:
        """The efficacy, in [0, 100]."""
        parts = {}
        for part in ("retain", "test", "forget"):
            rows = getattr(self, part)
            # one tensor once the ranks have shared their rows, a list before
            parts[part] = dim_zero_cat(rows) if len(rows) else torch.empty(0, 1)
        efficacy, _ = membership_inference(**parts, max_rows=self.max_rows, seed=self.seed)
        return torch.tensor(efficacy, device=self.device)
