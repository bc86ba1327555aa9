"""TRADES: what robustness adds to the loss."""

from __future__ import annotations

from torch import Tensor

from lightning_trust.functional.adversarial.losses import kl_divergence


def trades_kl(clean_logits: Tensor, adversarial_logits: Tensor) -> Tensor:
    r"""Mean divergence of the predictions on adversarial inputs from those on clean ones; both take gradients.

    .. math:: \frac1N \sum_i D_{KL}(p(x_i) \,\Vert\, p(x_i'))

    Paper: Theoretically Principled Trade-off between Robustness and Accuracy (ICML 2019), whose loss is
    :math:`\ell(f(x), y) + \beta` times this.

    Args:
        clean_logits: Shape ``(N, K)``.
        adversarial_logits: Shape ``(N, K)``.

    Returns:
        A scalar, at least 0.

    Example:
        >>> import torch
        >>> trades_kl(torch.zeros(1, 2), torch.tensor([[0.0, 1.0986123]])).item() # doctest: +ELLIPSIS
        0.1438...

    """
    return kl_divergence(adversarial_logits, clean_logits).mean()
