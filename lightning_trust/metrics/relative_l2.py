"""Relative error in the L2 norm as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class RelativeL2(Metric):
    r"""Distance of predictions from the exact values, as a share of the size of these; 0 is best.

    .. math:: \frac{\|\hat u - u\|_2}{\|u\|_2} = \sqrt{\frac{\sum_b (\hat u_b - u_b)^2}{\sum_b u_b^2}}

    Sums run over all points of all batches, in float64. NaN or infinite where all exact values are 0.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = RelativeL2()
        >>> metric.update(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
        >>> metric.compute()
        tensor(0.1000)

    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    error: Tensor
    size: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("error", "size"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add points.

        Args:
            preds: Predicted values, any shape.
            target: Exact values, of the same shape.

        Raises:
            ValueError: If the shapes differ.

        """
        if preds.shape != target.shape:
            raise ValueError(
                "Expected arguments `preds` and `target` to be of the same shape, but got"
                f" {tuple(preds.shape)} and {tuple(target.shape)}."
            )
        exact = target.detach().double()
        self.error += (preds.detach().double() - exact).square().sum()
        self.size += exact.square().sum()

    def compute(self) -> Tensor:
        """The relative error of all points, a scalar."""
        return (self.error / self.size).sqrt().float()
