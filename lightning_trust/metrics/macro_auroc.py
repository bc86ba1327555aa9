"""Area under the ROC curve of several labels as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat


class MacroAUROC(Metric):
    r"""Mean over labels of the area under the ROC curve, of the labels that have one.

    .. math:: \mathrm{AUROC}_k = \Pr[f_k(x^+) > f_k(x^-)] + \tfrac12 \Pr[f_k(x^+) = f_k(x^-)]

    A label with one value only in the data has no curve and is left out, with a warning; torchmetrics' own counts it
    as 0.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Warns:
        UserWarning: If a label is left out.

    Example:
        >>> metric = MacroAUROC()
        >>> logits = torch.tensor([[0.1, 3.0], [0.4, 2.0], [0.3, 1.0], [0.8, 0.0]])
        >>> metric.update(logits, torch.tensor([[0, 1], [0, 0], [1, 0], [1, 0]]))
        >>> metric.compute()
        tensor(0.8750)

    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    logits: list[Tensor]
    targets: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add samples.

        Args:
            logits: Shape ``(N, K)``.
            targets: Multi-hot, of any type, shape ``(N, K)``.

        Raises:
            ValueError: If the shapes do not fit.

        """
        if logits.ndim != 2 or targets.shape != logits.shape:
            raise ValueError(
                "Expected arguments `logits` and `targets` to have one shape (N, K), but got"
                f" {tuple(logits.shape)} and {tuple(targets.shape)}."
            )
        self.logits.append(logits.detach().float())
        self.targets.append(targets > 0.5)

    def compute(self) -> Tensor:
        """The mean, in [0, 1]; NaN where no label has both values."""
        if not len(self.logits):
            return torch.tensor(float("nan"), device=self.device)
        logits, targets = dim_zero_cat(self.logits), dim_zero_cat(self.targets).bool()
        both = targets.any(dim=0) & ~targets.all(dim=0)
        left = (~both).nonzero().flatten().tolist()
        if left:
            rank_zero_warn(f"Labels {left} have one value only, so they have no ROC curve and are left out.")
        # ranks in place of logits: torchmetrics passes logits through a sigmoid, which makes large ones equal
        places = [logits[:, label].unique(return_inverse=True)[1].double() for label in range(logits.shape[1])]
        values = [
            binary_auroc(places[label] / len(logits), targets[:, label].long())
            for label in both.nonzero().flatten().tolist()
        ]
        return torch.stack(values).float().mean() if values else torch.tensor(float("nan"), device=self.device)
