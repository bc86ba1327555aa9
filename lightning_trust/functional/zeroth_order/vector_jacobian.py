"""Vector-Jacobian products of a black box, per sample, from its values alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Points ``(M, d)`` and the sample ``(M,)`` that each belongs to -> answers ``(M, m)``; a row that is not finite has
#: no answer.
Answers = Callable[[Tensor, Tensor], Tensor]

# how many numbers the points of one call may hold
_NUMBERS = 1 << 22


@dataclass(frozen=True)
class VJPEstimate:
    r"""What was estimated, and from how much.

    Attributes:
        gradient: The estimate of :math:`J_g(z)^\top v`, shape ``(B, d)``; 0 where nothing was answered.
        queries: Number of points that were asked.
        one_sided: Number of differences of which a side, in one coordinate at least, stayed at the middle because the
            box or a missing answer wanted it so.
        missing: Number of directions without a difference, for each sample, shape ``(B,)``.
        snr: Signal to noise of the estimate: squared mean over variance of that mean, each summed over samples and
            coordinates, less the 1 that noise alone would give, and not below 0. For linear :math:`g` about
            :math:`q / (d + 1)`. NaN for fewer than two directions and for coordinates, which have no such noise.

    """

    gradient: Tensor
    queries: int
    one_sided: int
    missing: Tensor
    snr: float


def coordinate_vjp(
    answers: Answers,
    points: Tensor,
    cotangents: Tensor,
    mu: float,
    base: Tensor | None = None,
    central: bool = True,
    scale: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> VJPEstimate:
    r"""Vector-Jacobian products by differences along every coordinate (CGE), for each sample of its own.

    .. math:: \hat a_i = v^\top \frac{g(z + h_i e_i) - g(z - h_i e_i)}{2 h_i}, \qquad h_i = \mu \, \sigma_i

    or, one-sided, :math:`\hat a_i = v^\top (g(z + h_i e_i) - g(z)) / h_i`. Central differences are exact where
    :math:`g` is quadratic, one-sided ones where it is linear. They cost ``2 d`` and ``d`` points a sample.

    Paper: Zeroth-Order SciML: Non-intrusive Integration of Scientific Software with Deep Learning (arXiv 2206.02785).

    Args:
        answers: The black box; see :data:`Answers`.
        points: :math:`z`, shape ``(B, d)``.
        cotangents: :math:`v`, shape ``(B, m)``.
        mu: Length of a step, positive, in units of ``scale``.
        base: :math:`g(z)`, shape ``(B, m)``; one-sided differences need it, and central ones where they become
            one-sided save a point.
        central: Whether differences are central.
        scale: :math:`\sigma`, the unit of each coordinate, positive, shape ``(d,)`` or ``(B, d)``; 1 if None.
        bounds: Lowest and highest value of each coordinate, each broadcasting to ``(B, d)``. A side that would leave
            the box stays at the middle; where both would, the difference goes from bound to bound.

    Raises:
        ValueError: If ``mu`` is not positive, so small that a step is lost in rounding, or one-sided differences lack
            ``base``.

    Example:
        >>> square = lambda z, rows: z.square().sum(dim=1, keepdim=True)
        >>> z = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> coordinate_vjp(square, z, torch.ones(1, 1), mu=0.5).gradient
        tensor([[2., 4.]], dtype=torch.float64)
        >>> coordinate_vjp(square, z, torch.ones(1, 1), mu=0.5, base=square(z, None), central=False).gradient
        tensor([[2.5000, 4.5000]], dtype=torch.float64)

    """
    size = points.shape[1]
    units = torch.eye(size, dtype=points.dtype, device=points.device)[:, None].expand(size, *points.shape)
    sums = _Sums(points)
    for some in _chunks(units):
        sums.add(_contributions(answers, points, cotangents, some, mu, base, central, scale, bounds))
    # each coordinate has a direction of its own: a sum, not a mean
    return VJPEstimate(sums.total, sums.queries, sums.one_sided, sums.missing, float("nan"))


def random_vjp(
    answers: Answers,
    points: Tensor,
    cotangents: Tensor,
    directions: Tensor,
    mu: float,
    base: Tensor | None = None,
    central: bool = True,
    scale: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> VJPEstimate:
    r"""Vector-Jacobian products by differences along random directions (RGE), for each sample of its own.

    .. math:: \hat a = \frac1q \sum_{k=1}^q \frac{u_k}{\sigma} \, v^\top s_k, \qquad
        s_k = \frac{g(z + \mu \sigma u_k) - g(z - \mu \sigma u_k)}{2 \mu}

    with standard normal :math:`u_k`, or one-sided :math:`s_k = (g(z + \mu \sigma u_k) - g(z)) / \mu`. The mean is that
    of the gradient of :math:`v^\top g` smoothed by a normal distribution of width :math:`\mu \sigma`; for linear
    :math:`g`, whose gradient is :math:`a`, it is exact, with the mean square error
    :math:`(d + 1) \Vert a \Vert^2 / q`. They cost ``2 q`` and ``q`` points a sample.

    A coordinate that would leave the box on one side stays at the middle there, and its share of the estimate is
    divided by the width that is left: the mean for linear :math:`g` remains exact. A side without an answer stays at
    the middle as a whole; a direction without a difference is left out of the mean.

    Paper: Zeroth-Order SciML: Non-intrusive Integration of Scientific Software with Deep Learning (arXiv 2206.02785).

    Args:
        answers: The black box; see :data:`Answers`.
        points: :math:`z`, shape ``(B, d)``.
        cotangents: :math:`v`, shape ``(B, m)``.
        directions: The :math:`u_k`, symmetric in every coordinate, with unit variance; shape ``(q, B, d)``.
        mu: Length of a step, positive, in units of ``scale``.
        base: :math:`g(z)`, shape ``(B, m)``.
        central: Whether differences are central.
        scale: :math:`\sigma`, the unit of each coordinate, positive, shape ``(d,)`` or ``(B, d)``; 1 if None.
        bounds: Lowest and highest value of each coordinate, each broadcasting to ``(B, d)``.

    Raises:
        ValueError: If ``mu`` is not positive, so small that a step is lost in rounding, or one-sided differences lack
            ``base``.

    Example:
        >>> linear = lambda z, rows: z @ torch.tensor([[2.0], [-1.0]])
        >>> u = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> random_vjp(linear, torch.zeros(1, 2), torch.ones(1, 1), u, mu=0.5).gradient * 2
        tensor([[ 2., -1.]])

    """
    sums = _Sums(points)
    for some in _chunks(directions):
        sums.add(_contributions(answers, points, cotangents, some, mu, base, central, scale, bounds))
    found = (len(directions) - sums.missing).unsqueeze(1)
    mean = sums.total / found.clamp(min=1)
    return VJPEstimate(mean, sums.queries, sums.one_sided, sums.missing, _snr(mean, sums.squares, found))


class _Sums:
    """What the directions so far add up to."""

    def __init__(self, points: Tensor) -> None:
        self.total = torch.zeros_like(points)
        self.squares = torch.zeros_like(points)
        self.missing = torch.zeros(len(points), dtype=torch.long, device=points.device)
        self.queries = 0
        self.one_sided = 0

    def add(self, found: tuple[Tensor, Tensor, int, int]) -> None:
        contributions, missing, queries, one_sided = found
        self.total += contributions.sum(dim=0)
        self.squares += contributions.square().sum(dim=0)
        self.missing += missing.sum(dim=0)
        self.queries += queries
        self.one_sided += one_sided


def _chunks(directions: Tensor) -> Iterator[Tensor]:
    yield from directions.split(max(1, _NUMBERS // max(1, directions[0].numel())))


def _contributions(
    answers: Answers,
    points: Tensor,
    cotangents: Tensor,
    directions: Tensor,
    mu: float,
    base: Tensor | None,
    central: bool,
    scale: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, int, int]:
    """What each direction adds, ``(k, B, d)``; where it has no difference, ``(k, B)``; points asked; one-sided."""
    if not mu > 0.0:
        raise ValueError(f"Expected argument `mu` to be positive, but got {mu}.")
    if not central and base is None:
        raise ValueError("Expected argument `base` to hold the values at the points for one-sided differences.")
    directions = directions.to(points)
    step = mu * directions if scale is None else mu * scale * directions
    plus, minus = _ends(points, step, central, bounds)
    width = plus - minus
    # single coordinates of a random direction may be too small to matter
    if bool(((width == 0.0).all(dim=-1) & (step != 0.0).any(dim=-1)).any()):
        raise ValueError(
            f"Expected argument `mu` to move every coordinate, but with {mu} a step is lost in the rounding of"
            f" {points.dtype}. Take a larger `mu` or `scale`."
        )
    (upper, lower), queries = _asked(answers, points, torch.stack([plus, minus]), base)
    plus_known, minus_known = upper.isfinite().all(dim=-1), lower.isfinite().all(dim=-1)
    one_sided = int(((plus == points) | (minus == points)).logical_and(step != 0.0).any(dim=-1).sum()) if central else 0
    if base is not None and not bool((plus_known & minus_known).all()):
        # the middle stands in for one side that has no answer
        middle_known = base.isfinite().all(dim=-1).expand_as(plus_known)
        for known, other, values, ends in (
            (plus_known, minus_known, upper, plus),
            (minus_known, plus_known, lower, minus),
        ):
            alone = ~known & other & middle_known
            values[alone] = base.to(values).expand_as(values)[alone]
            ends[alone] = points.expand_as(ends)[alone]
            one_sided += int(alone.sum())
        width = plus - minus
        known = upper.isfinite().all(dim=-1) & lower.isfinite().all(dim=-1)
    else:
        known = plus_known & minus_known
    slope = ((upper - lower) * cotangents.to(upper)).sum(dim=-1)
    weight = torch.where(width == 0.0, 0.0, directions.square() / torch.where(width == 0.0, 1.0, width))
    contributions = torch.where(known.unsqueeze(-1), slope.unsqueeze(-1) * weight, 0.0)
    return contributions, ~known, queries, one_sided


def _ends(points: Tensor, step: Tensor, central: bool, bounds: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Both ends of every difference, within the box."""
    plus, minus = points + step, points - step
    middle = points.expand_as(step)
    if bounds is None:
        return plus, minus if central else middle.clone()
    lowest, highest = (bound.to(points) for bound in bounds)
    plus_fits = (plus >= lowest) & (plus <= highest)
    minus_fits = (minus >= lowest) & (minus <= highest)
    inside_plus = torch.where(plus_fits, plus, torch.where(minus_fits, middle, plus.clamp(lowest, highest)))
    inside_minus = torch.where(minus_fits, minus, torch.where(plus_fits, middle, minus.clamp(lowest, highest)))
    if central:
        return inside_plus, inside_minus
    # a one-sided difference that leaves the box goes over both sides, coordinate by coordinate
    fits = plus_fits.all(dim=-1, keepdim=True)
    return torch.where(fits, plus, inside_plus), torch.where(fits, middle, inside_minus)


def _asked(answers: Answers, points: Tensor, ends: Tensor, base: Tensor | None) -> tuple[Tensor, int]:
    """Answers at ``ends`` ``(2, k, B, d)``, those at the middle taken from ``base``; and how many were asked."""
    rows = torch.arange(len(points), device=points.device).expand(ends.shape[:-1])
    ask = torch.ones_like(rows, dtype=torch.bool) if base is None else (ends != points).any(dim=-1)
    found = answers(ends[ask], rows[ask])
    values = found.new_empty(*rows.shape, found.shape[-1])
    if base is not None:
        values[~ask] = base.to(found)[rows[~ask]]
    values[ask] = found
    return values, int(ask.sum())


def _snr(mean: Tensor, squares: Tensor, found: Tensor) -> float:
    if not mean.numel() or int(found.min()) < 2:
        return float("nan")
    # of the mean, from the spread of the directions
    variance = float(((squares / found - mean.square()).clamp(min=0.0) / (found - 1)).sum())
    return max(0.0, float(mean.square().sum()) / variance - 1.0) if variance > 0.0 else float("nan")
