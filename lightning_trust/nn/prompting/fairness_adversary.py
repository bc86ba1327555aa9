"""Reads a sensitive attribute from a classifier's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FairnessCriterion = Literal["dp", "eo"]


class FairnessAdversary(nn.Module):
    r"""A small network that tells the group of a sample from what a classifier says about it.

    .. math:: d([s, s \odot y, z]), \qquad s = \mathrm{softmax}\big((1 + |c|) \, z\big)

    with logits :math:`z`, a learned scalar :math:`c`, 1 in the beginning, and the class :math:`y` as one-hot. For
    demographic parity (``"dp"``) it does not see the class: what it finds is any dependence of the output on the group.
    For equalised odds (``"eo"``) it does, and finds what the class does not explain. For one logit :math:`s` is a
    sigmoid, and the middle part is :math:`[s y, s (1 - y)]`.

    Papers: Mitigating Unwanted Biases with Adversarial Learning (AIES 2018, arXiv:1801.07593); Fairness Reprogramming
    (NeurIPS 2022).

    Shape:
        - Logits: :math:`(N, K)` with ``K = num_classes``; targets: int64 :math:`(N,)`.
        - Output: logits of the groups, :math:`(N, G)`.

    Args:
        num_classes: Number of the classifier's logits; 1 for a binary classifier with one.
        num_groups: Number of groups, at least 2, or at least 1 where they overlap.
        criterion: ``"dp"`` or ``"eo"``.
        hidden: Units of each hidden layer; the paper has 512 for images, and 128 twice for text.
        use_logits: Whether the raw logits are given as well.
        overlapping: Whether a sample can be in several groups, or none: binary cross-entropy a group in place of
            cross-entropy over groups.

    Raises:
        ValueError: If an argument is out of its range, or shapes do not fit.

    Example:
        >>> adversary = FairnessAdversary(num_classes=3, num_groups=2, criterion="eo")
        >>> adversary(torch.zeros(4, 3), torch.tensor([0, 1, 2, 2])).shape
        torch.Size([4, 2])

    """

    def __init__(
        self,
        num_classes: int = 2,
        num_groups: int = 2,
        criterion: FairnessCriterion = "dp",
        hidden: Sequence[int] = (512,),
        use_logits: bool = True,
        overlapping: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"Expected argument `num_classes` to be at least 1, but got {num_classes}.")
        least = 1 if overlapping else 2
        if num_groups < least:
            raise ValueError(f"Expected argument `num_groups` to be at least {least}, but got {num_groups}.")
        if criterion not in get_args(FairnessCriterion):
            raise ValueError(f"Expected argument `criterion` to be 'dp' or 'eo', but got {criterion!r}.")
        if not all(width > 0 for width in hidden):
            raise ValueError(f"Expected argument `hidden` to be positive integers, but got {hidden}.")
        self.num_classes = num_classes
        self.num_groups = num_groups
        self.criterion: FairnessCriterion = criterion
        self.use_logits = use_logits
        self.overlapping = overlapping
        self.sharpness = nn.Parameter(torch.ones(()))
        seen = {"dp": 1, "eo": 3 if num_classes == 1 else 2}[criterion] + use_logits
        layers: list[nn.Module] = []
        before = num_classes * seen
        for width in hidden:
            layers += [nn.Linear(before, width), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(*layers, nn.Linear(before, num_groups))

    def forward(self, logits: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of the groups from those of the classes and, for equalised odds, the classes themselves."""
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"Expected logits of shape (N, {self.num_classes}), one a class, but got {tuple(logits.shape)}. Pass"
                " `num_classes=...`, or the `network` whose output they are."
            )
        scaled = logits * (1.0 + self.sharpness.abs())
        scores = scaled.sigmoid() if self.num_classes == 1 else scaled.softmax(dim=1)
        seen = [scores]
        if self.criterion == "eo":
            if targets is None or targets.shape != logits.shape[:1]:
                found = "none" if targets is None else str(tuple(targets.shape))
                raise ValueError(f"Expected targets of shape ({len(logits)},) for criterion='eo', but got {found}.")
            if self.num_classes == 1:
                yes = targets[:, None].to(scores.dtype)
                seen += [scores * yes, scores * (1.0 - yes)]
            else:
                seen.append(scores * F.one_hot(targets.long(), self.num_classes))
        if self.use_logits:
            seen.append(logits)
        return self.layers(torch.cat(seen, dim=1))

    def loss(self, logits: Tensor, targets: Tensor | None, groups: Tensor) -> Tensor:
        """Mean cross-entropy of the groups, at least 0.

        Args:
            logits: The classifier's, shape ``(N, K)``; they take a gradient.
            targets: Classes, int64 ``(N,)``; they count for equalised odds alone.
            groups: The group of each sample, integer ``(N,)``, or, where they overlap, zeros and ones ``(N, G)``.

        """
        found = self(logits, targets)
        if self.overlapping:
            if groups.shape != found.shape:
                raise ValueError(
                    f"Expected overlapping groups as zeros and ones of shape {tuple(found.shape)}, but got"
                    f" {tuple(groups.shape)}."
                )
            return F.binary_cross_entropy_with_logits(found, groups.to(found.dtype))
        if groups.shape != found.shape[:1] or groups.is_floating_point():
            raise ValueError(
                f"Expected groups as integers of shape ({len(found)},), but got {groups.dtype} of shape"
                f" {tuple(groups.shape)}."
            )
        return F.cross_entropy(found, groups.long())
