"""Projection onto the probability simplex."""

from __future__ import annotations

import torch
from torch import Tensor

# halvings of an interval of length 1, after which the shift is known to 1e-9
_HALVINGS = 30


def project_to_simplex(values: Tensor) -> Tensor:
    r"""Nearest point of the probability simplex to each row: entries in [0, 1] with the sum 1.

    .. math:: \Pi(v)_i = \max(v_i - \tau, 0), \qquad \sum_i \max(v_i - \tau, 0) = 1

    The shift :math:`\tau` lies between :math:`\max_i v_i - 1` and :math:`\max_i v_i`. Bisection finds it well enough to
    tell which entries stay positive, and from these it follows in closed form. No row is sorted, which counts where
    rows are as long as a vocabulary.

    Args:
        values: Floating, shape ``(..., V)``.

    Returns:
        Same shape and type; at least float32 is used within.

    Example:
        >>> project_to_simplex(torch.tensor([[0.5, 0.7, -1.0], [0.0, 1.0, 0.0]]))
        tensor([[0.4000, 0.6000, 0.0000],
                [0.0000, 1.0000, 0.0000]])

    """
    rows = values.to(torch.promote_types(values.dtype, torch.float32))
    high = rows.amax(dim=-1, keepdim=True)
    low = high - 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        too_much = (rows - middle).clamp_min(0.0).sum(dim=-1, keepdim=True) > 1.0
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    # `low` is never above the shift, so that no entry that stays positive is missed
    positive = rows > low
    above = torch.where(positive, rows, torch.zeros_like(rows))
    shift = (above.sum(dim=-1, keepdim=True) - 1.0) / positive.sum(dim=-1, keepdim=True)
    return (rows - shift).clamp(0.0, 1.0).to(values.dtype)
