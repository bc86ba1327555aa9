"""Curves between the weights of two networks: coefficients of their bends, the barrier, the best point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Curve = Literal["bezier", "polychain"]


def bezier_coefficients(t: Tensor, num_bends: int) -> Tensor:
    r"""What each bend of a Bezier curve counts at position ``t``.

    .. math:: c_j(t) = \binom{B - 1}{j} \, t^j (1 - t)^{B - 1 - j}, \qquad \theta(t) = \sum_{j=0}^{B-1} c_j(t) \theta_j

    They are at least 0 and sum to 1. At 0 and 1 the first and the last are exactly 1, the others exactly 0.

    Paper: Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs (NeurIPS 2018).

    Args:
        t: Position in [0, 1], a floating scalar.
        num_bends: Number :math:`B` of bends, both ends included, at least 2.

    Returns:
        Shape ``(B,)``.

    Raises:
        ValueError: If ``num_bends`` is below 2.

    Example:
        >>> bezier_coefficients(torch.tensor(0.5), 3)
        tensor([0.2500, 0.5000, 0.2500])

    """
    check_bends(num_bends)
    last = num_bends - 1
    places = torch.arange(num_bends, device=t.device, dtype=t.dtype)
    ways = torch.tensor([math.comb(last, j) for j in range(num_bends)], device=t.device, dtype=t.dtype)
    return ways * t**places * (1.0 - t) ** (last - places)


def polychain_coefficients(t: Tensor, num_bends: int) -> Tensor:
    r"""What each bend of a chain of straight segments counts at position ``t``.

    .. math:: c_j(t) = \max(0, 1 - |t (B - 1) - j|)

    They are at least 0 and sum to 1; at :math:`t = j / (B - 1)` the curve passes through bend :math:`j`.

    Paper: Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs (NeurIPS 2018).

    Args:
        t: Position in [0, 1], a floating scalar.
        num_bends: Number :math:`B` of bends, both ends included, at least 2.

    Returns:
        Shape ``(B,)``.

    Raises:
        ValueError: If ``num_bends`` is below 2.

    Example:
        >>> polychain_coefficients(torch.tensor(0.75), 3)
        tensor([0.0000, 0.5000, 0.5000])

    """
    check_bends(num_bends)
    places = torch.arange(num_bends, device=t.device, dtype=t.dtype)
    return (1.0 - (t * (num_bends - 1) - places).abs()).clamp_min(0.0)


def curve_coefficients(t: Tensor, num_bends: int, curve: Curve = "bezier") -> Tensor:
    """What each bend of a curve counts at position ``t``.

    Args:
        t: Position in [0, 1], a floating scalar.
        num_bends: Number of bends, both ends included, at least 2.
        curve: ``"bezier"`` or ``"polychain"``.

    Returns:
        Shape ``(num_bends,)``, at least 0, with sum 1.

    Raises:
        ValueError: If there is no such curve, or ``num_bends`` is below 2.

    Example:
        >>> curve_coefficients(torch.tensor(0.0), 4, "polychain")
        tensor([1., 0., 0., 0.])

    """
    check_curve(curve)
    return (bezier_coefficients if curve == "bezier" else polychain_coefficients)(t, num_bends)


def loss_barrier(losses: Sequence[float]) -> float:
    r"""How far a loss rises along a curve above the worse of its ends.

    .. math:: \max_t \ell(t) - \max(\ell(0), \ell(1))

    Args:
        losses: The loss at positions in ascending order, both ends included.

    Returns:
        At least 0; 0 where no point is worse than the worse end.

    Raises:
        ValueError: If there are fewer than two losses.

    Example:
        >>> loss_barrier([0.5, 1.25, 0.75])
        0.5

    """
    if len(losses) < 2:
        raise ValueError(f"Expected argument `losses` to hold both ends of a curve, but got {list(losses)}.")
    return max(losses) - max(losses[0], losses[-1])


def best_positions(
    union: Sequence[float], mean: Sequence[float], by: Literal["union", "mean"] = "union", top_k: int = 1
) -> list[int]:
    """The points of a curve that resist best; of equal ones, those that are better by the other score, then the first.

    Args:
        union: Accuracy under all attacks at once, at each position.
        mean: Mean of the accuracies under each attack.
        by: Which of the two decides.
        top_k: How many points.

    Returns:
        Indices of the positions, best first.

    Raises:
        ValueError: If the scores do not fit each other, or ``top_k`` is out of its range.

    Example:
        >>> best_positions(union=[0.2, 0.4, 0.4], mean=[0.6, 0.5, 0.7], top_k=2)
        [2, 1]

    """
    if len(union) != len(mean):
        raise ValueError(f"Expected `union` and `mean` to be of one length, but got {len(union)} and {len(mean)}.")
    if by not in ("union", "mean"):
        raise ValueError(f"Expected argument `by` to be 'union' or 'mean', but got {by!r}.")
    if not 1 <= top_k <= len(union):
        raise ValueError(f"Expected argument `top_k` to be in [1, {len(union)}], but got {top_k}.")
    first, second = (union, mean) if by == "union" else (mean, union)
    return sorted(range(len(union)), key=lambda place: (-first[place], -second[place], place))[:top_k]


def check_bends(num_bends: int) -> None:
    """Raise ValueError where a curve cannot have so many bends."""
    if num_bends < 2:
        raise ValueError(f"Expected argument `num_bends` to be at least 2, both ends included, but got {num_bends}.")


def check_curve(curve: str) -> None:
    """Raise ValueError where there is no such curve."""
    if curve not in ("bezier", "polychain"):
        raise ValueError(f"Expected argument `curve` to be 'bezier' or 'polychain', but got {curve!r}.")


def check_position(t: float, name: str = "t") -> None:
    """Raise ValueError where a position is not on the curve."""
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"Expected argument `{name}` to be in [0, 1], but got {t}.")
