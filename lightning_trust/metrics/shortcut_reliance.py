"""How far a network leans on a known shortcut, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ShortcutReliance(Metric):
    r"""Accuracy where the shortcut agrees with the class minus accuracy where it conflicts.

    .. math:: \Pr[f(x) = y \mid s = y] - \Pr[f(x) = y \mid s \neq y]

    with :math:`s` the class that the shortcut of a sample points at: 0 for a network that does not look at it, 1 for
    one that looks at nothing else.

    Paper: Saliency Guided Adversarial Training for Learning Generalizable Features with Applications to Medical
    Imaging Classification System (arXiv:2209.04326).

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = ShortcutReliance()
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
        >>> metric.update(logits, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 0, 0]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'aligned': 1.0, 'conflicting': 0.5, 'reliance': 0.5}

    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # conflicting, aligned
        self.add_state("correct", default=torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, shown: Tensor) -> None:
        """Add samples.

        Args:
            logits: Shape ``(N, K)``.
            targets: Classes, int64, shape ``(N,)``.
            shown: The class that the shortcut of each sample points at, int64, shape ``(N,)``.

        Raises:
            ValueError: If the shapes do not fit.

        """
        if logits.ndim != 2 or targets.shape != logits.shape[:1] or shown.shape != targets.shape:
            raise ValueError(
                "Expected arguments `logits`, `targets` and `shown` to have shapes (N, K), (N,) and (N,), but got"
                f" {tuple(logits.shape)}, {tuple(targets.shape)} and {tuple(shown.shape)}."
            )
        aligned = (shown == targets).long()
        self.total += torch.bincount(aligned, minlength=2)
        self.correct += torch.bincount(aligned[logits.argmax(dim=1) == targets], minlength=2)

    def compute(self) -> dict[str, Tensor]:
        """The two accuracies and ``"reliance"``, their difference, in [-1, 1]; NaN where there was no such sample."""
        conflicting, aligned = (self.correct / self.total).unbind()
        return {"aligned": aligned, "conflicting": conflicting, "reliance": aligned - conflicting}
