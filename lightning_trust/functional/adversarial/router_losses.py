"""What the router of a network of experts minimises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_trust.functional.adversarial.trades import trades_kl


def class_mod_router_loss(
    clean_scores: Tensor, adversarial_scores: Tensor, targets: Tensor, alpha: float = 6.0, beta: float = 6.0
) -> Tensor:
    r"""A router that sends class :math:`y` to expert :math:`y \bmod E`, on adversarial inputs as on clean ones.

    .. math:: \alpha \, \mathrm{CE}(R(x), y \bmod E) + \beta \, \frac1N \sum_i D_{KL}(s(x_i) \,\Vert\, s(x_i')),
        \qquad s = \mathrm{softmax}(R)

    The objective of the public code of Robust Mixture-of-Expert Training for Convolutional Neural Networks (ICCV 2023).
    It needs no expert, and no expert is left without images.

    Args:
        clean_scores: Scores of the experts, shape ``(N, E)``.
        adversarial_scores: Scores on adversarial inputs, shape ``(N, E)``.
        targets: Classes, int64, shape ``(N,)``.
        alpha: Weight of the cross-entropy.
        beta: Weight of the divergence.

    Returns:
        A scalar, at least 0.

    Example:
        >>> import torch
        >>> scores = torch.zeros(3, 2)
        >>> class_mod_router_loss(scores, scores, torch.tensor([0, 1, 5])).item() # 6 log 2 # doctest: +ELLIPSIS
        4.158...

    """
    cross_entropy = F.cross_entropy(clean_scores, targets % clean_scores.shape[1])
    return alpha * cross_entropy + beta * trades_kl(clean_scores, adversarial_scores)


def balance_loss(scores: Tensor, shares: Tensor) -> Tensor:
    r"""How unevenly the experts are used: 1 where all are used alike, ``E`` where one is used alone.

    .. math:: E \sum_e f_e \, \frac1N \sum_i \mathrm{softmax}(s_i)_e

    Paper: Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity (JMLR 2022).

    Args:
        scores: Scores of the experts, shape ``(N, E)``; they take gradients.
        shares: Share :math:`f_e` of the images that go to each expert, shape ``(E,)``.

    Returns:
        A scalar in ``(0, E]``.

    Example:
        >>> import torch
        >>> balance_loss(torch.tensor([[20.0, -20.0]]), torch.tensor([1.0, 0.0])).item()
        2.0

    """
    return scores.shape[1] * (shares * scores.softmax(dim=1).mean(dim=0)).sum()


def expert_shares(scores: Tensor) -> Tensor:
    """Share of the images that go to each expert, the one with the largest score.

    Args:
        scores: Shape ``(N, E)``.

    Returns:
        Shape ``(E,)``, in [0, 1], with the sum 1; no gradient.

    Example:
        >>> import torch
        >>> expert_shares(torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 3.0], [0.0, 5.0]]))
        tensor([0.2500, 0.7500])

    """
    return F.one_hot(scores.argmax(dim=1), scores.shape[1]).float().mean(dim=0)
