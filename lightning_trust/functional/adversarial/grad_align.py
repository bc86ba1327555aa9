"""GradAlign: input gradients that point the same way all over the ball."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_misalignment(first: Tensor, second: Tensor) -> Tensor:
    r"""One minus the mean cosine of two batches of gradients.

    .. math:: 1 - \frac1N \sum_i
        \frac{\langle g_i, h_i \rangle}{\lVert g_i \rVert_2 \lVert h_i \rVert_2}

    A sample whose gradient vanishes on either side counts as aligned: there is nothing to align.

    Paper: Understanding and Improving Fast Adversarial Training (NeurIPS 2020).

    Args:
        first: Shape ``(N, ...)``.
        second: Same shape.

    Returns:
        A scalar in [0, 2].

    Example:
        >>> gradient_misalignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(0.2929)

    """
    g, h = first.flatten(1), second.flatten(1)
    lengths = g.norm(dim=1) * h.norm(dim=1)
    aligned = lengths == 0.0
    cosine = (g * h).sum(dim=1) / lengths.masked_fill(aligned, 1.0)
    return (1.0 - torch.where(aligned, torch.ones_like(cosine), cosine)).mean()
