"""MART: misclassification-aware adversarial training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_trust.functional.adversarial.losses import check_classes, kl_divergence


def mart_loss(clean_logits: Tensor, adversarial_logits: Tensor, targets: Tensor, beta: float = 5.0) -> Tensor:
    r"""Boosted cross-entropy on adversarial inputs, and a divergence that counts more where the clean input is missed.

    .. math::
        \frac1N \sum_i -\log p_y(x_i') - \log\big(1 - \max_{k \ne y} p_k(x_i')\big) +
        \beta \, D_{KL}(p(x_i) \,\Vert\, p(x_i')) \, (1 - p_y(x_i))

    with 1.0001 for the 1 of the second logarithm and 1.0000001 for that of the weight, as in the authors' code.

    Paper: Improving Adversarial Robustness Requires Revisiting Misclassified Examples (ICLR 2020).

    Args:
        clean_logits: Shape ``(N, K)``.
        adversarial_logits: Shape ``(N, K)``.
        targets: Classes, shape ``(N,)``.
        beta: Weight of the divergence.

    Returns:
        A scalar.

    Example:
        >>> round(mart_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        1.3861

    """
    check_classes(adversarial_logits, 2, "mart")
    wide = torch.promote_types(adversarial_logits.dtype, torch.float32)
    adversarial = adversarial_logits.to(wide)
    probabilities = adversarial.softmax(dim=1)
    others = probabilities.scatter(1, targets[:, None], 0.0).amax(dim=1)
    boosted = F.cross_entropy(adversarial, targets, reduction="none") - torch.log(1.0001 - others + 1e-12)
    true = clean_logits.to(wide).softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    return (boosted + beta * kl_divergence(adversarial, clean_logits) * (1.0000001 - true)).mean()
