"""The loss of class-wise adversarial visual prompting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def class_mean_sum(values: Tensor, targets: Tensor) -> Tensor:
    """Sum over the classes of a batch of the mean of their samples' values.

    Args:
        values: One a sample, shape ``(N,)``.
        targets: Classes, int64, shape ``(N,)``.

    Example:
        >>> float(class_mean_sum(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2])))
        7.0

    """
    counts = torch.bincount(targets)
    return (values / counts[targets].to(values.dtype)).sum()


def class_wise_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every sample under the prompt of its own class, summed over the means of the classes.

    Args:
        logits: Outputs under every prompt, shape ``(N, P, K)``; with one prompt it is the plain mean over the batch.
        targets: Classes, int64, shape ``(N,)``.

    """
    if logits.shape[1] == 1:
        return F.cross_entropy(logits[:, 0], targets)
    own = logits[torch.arange(len(targets), device=logits.device), targets]
    return class_mean_sum(F.cross_entropy(own, targets, reduction="none"), targets)


def class_wise_interrelation(
    logits: Tensor, targets: Tensor, tau: float = 0.1, terms: Sequence[bool] = (True, True, True)
) -> Tensor:
    r"""How prompts of classes must relate: which of them may be confident of what.

    From "Visual Prompting for Adversarial Robustness" (ICASSP 2023). With the confidences :math:`q_{nik}` of class
    :math:`k` under the prompt of class :math:`i`:

    .. math:: \sum_j \Big( \underset{y_n = j}{\mathrm{mean}} \max(\max_{i \ne j} q_{nii} - q_{njj}, -\tau)
        + \underset{y_n \ne j}{\mathrm{mean}} \max(q_{njj} - \max_{k \ne j} q_{njk}, -\tau)
        + \underset{y_n = j}{\mathrm{mean}} \max(\max_{i \ne j} q_{nij} - q_{njj}, -\tau) \Big)

    The right prompt answers louder than the others; a wrong prompt does not answer for its own class; no other prompt
    sees more of the right class. With one prompt there is one term, :math:`\mathrm{mean}_n \max(\max_{k \ne y} q_{nk} -
    q_{ny}, -\tau)`. Classes that are not in the batch have no mean and count for nothing.

    Args:
        logits: Outputs under every prompt, shape ``(N, P, K)`` with ``P = K``, or ``P = 1``.
        targets: Classes, int64, shape ``(N,)``.
        tau: Margin from which on a term no longer counts, at least 0.
        terms: Which of the three terms count.

    Example:
        >>> logits = torch.zeros(4, 3, 3)
        >>> float(class_wise_interrelation(logits, torch.tensor([0, 1, 2, 0])))
        0.0

    """
    q = logits.float().softmax(dim=2) if logits.dtype.itemsize < 4 else logits.softmax(dim=2)
    rows = torch.arange(len(targets), device=logits.device)
    count = q.shape[2]
    if q.shape[1] == 1:
        right = q[rows, 0, targets]
        others = q[:, 0].scatter(1, targets[:, None], -torch.inf).amax(dim=1)
        return (others - right).clamp_min(-tau).mean()
    diagonal = q.diagonal(dim1=1, dim2=2)
    right = diagonal[rows, targets]
    total = q.new_zeros(())
    if terms[0]:
        others = diagonal.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
        total = total + class_mean_sum((others - right).clamp_min(-tau), targets)
    if terms[1]:
        off = q.masked_fill(torch.eye(count, dtype=torch.bool, device=q.device), -torch.inf).amax(dim=2)
        wrong = F.one_hot(targets, count) == 0
        values = torch.where(wrong, (diagonal - off).clamp_min(-tau), 0.0)
        total = total + (values.sum(dim=0) / wrong.sum(dim=0).clamp_min(1)).sum()
    if terms[2]:
        seen = q[rows, :, targets]
        others = seen.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
        total = total + class_mean_sum((others - right).clamp_min(-tau), targets)
    return total
