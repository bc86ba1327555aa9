"""Losses that attacks maximise, one value a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    r"""How far the logit of the target is above the largest other: :math:`z_y - \max_{k \ne y} z_k`.

    Negative where another class wins. The loss of Towards Evaluating the Robustness of Neural Networks (C&W, S&P 2017)
    is its negative.

    Args:
        logits: Shape ``(N, K)`` with ``K >= 2``.
        targets: Classes, shape ``(N,)``.

    Returns:
        Shape ``(N,)``.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0, 2.5]]), torch.tensor([0]))
        tensor([0.5000])

    """
    check_classes(logits, 2, "margin")
    target = logits.gather(1, targets[:, None]).squeeze(1)
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return target - others.amax(dim=1)


def dlr_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Difference of logits ratio, which no scaling of the logits changes.

    .. math:: -\frac{z_y - \max_{k \ne y} z_k}{z_{(1)} - z_{(3)} + 10^{-12}}

    with :math:`z_{(i)}` the logits in descending order.

    Paper: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks (ICML 2020).

    Args:
        logits: Shape ``(N, K)`` with ``K >= 3``.
        targets: Classes, shape ``(N,)``.

    Returns:
        Shape ``(N,)``; at most 1 where a sample is misclassified, negative where it is not.

    Raises:
        ValueError: If there are fewer than three classes.

    Example:
        >>> dlr_loss(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-0.5000])

    """
    check_classes(logits, 3, "dlr")
    best = logits.topk(3, dim=1).values
    return -margin(logits, targets) / (best[:, 0] - best[:, 2] + 1e-12)


def dlr_loss_targeted(logits: Tensor, targets: Tensor, goal: Tensor) -> Tensor:
    r"""Targeted difference of logits ratio: largest where the goal wins over the true class.

    .. math:: -\frac{z_y - z_t}{z_{(1)} - \frac12 (z_{(3)} + z_{(4)}) + 10^{-12}}

    Paper: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks (ICML 2020).

    Args:
        logits: Shape ``(N, K)`` with ``K >= 4``.
        targets: True classes, shape ``(N,)``.
        goal: Classes to be reached, shape ``(N,)``.

    Returns:
        Shape ``(N,)``.

    Raises:
        ValueError: If there are fewer than four classes.

    Example:
        >>> dlr_loss_targeted(torch.tensor([[4.0, 1.0, 2.0, 0.0]]), torch.tensor([0]), torch.tensor([2]))
        tensor([-0.5714])

    """
    check_classes(logits, 4, "targeted dlr")
    best = logits.topk(4, dim=1).values
    true = logits.gather(1, targets[:, None]).squeeze(1)
    other = logits.gather(1, goal[:, None]).squeeze(1)
    return -(true - other) / (best[:, 0] - 0.5 * (best[:, 2] + best[:, 3]) + 1e-12)


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of each sample from reference logits.

    .. math:: D_{KL}(p \,\Vert\, q) = \sum_k p_k (\log p_k - \log q_k), \qquad
        p = \mathrm{softmax}(\text{reference}), \; q = \mathrm{softmax}(\text{logits})

    Args:
        logits: Shape ``(N, K)``.
        reference: Shape ``(N, K)``.

    Returns:
        Shape ``(N,)``, at least 0 (up to rounding), in float32 at least.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> kl_divergence(logits, torch.tensor([[0.0, 1.0986123]])).item() # doctest: +ELLIPSIS
        0.1308...

    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    q, p = F.log_softmax(logits.to(wide), dim=1), F.log_softmax(reference.to(wide), dim=1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)


def check_classes(logits: Tensor, least: int, loss: str) -> None:
    """Raise ValueError where a loss needs more classes than there are."""
    if logits.ndim != 2:
        raise ValueError(f"Expected logits of shape (N, K) for loss '{loss}', but got shape {tuple(logits.shape)}.")
    if logits.shape[1] < least:
        raise ValueError(
            f"Expected at least {least} classes for loss '{loss}', but got logits of {logits.shape[1]}. Use loss='ce'"
            " or 'margin'."
        )
