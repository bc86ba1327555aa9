"""How far a measure can be trusted whose samples come in groups, such as images of one patient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def group_bootstrap_interval(
    statistic: Callable[[Tensor], float],
    groups: Tensor,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    r"""Percentile interval of a statistic over resamples of whole groups, drawn with replacement.

    .. math:: \big[ Q_{\alpha / 2}, Q_{1 - \alpha / 2} \big] \text{ of }
        \theta(G_{i_1} \cup \dots \cup G_{i_m}), \qquad i_1, \dots, i_m \sim U\{1, \dots, m\}

    for :math:`m` groups. Samples of one group tell less than as many of different groups: an interval that resamples
    rows is too narrow for them. Where each row is a group of its own this is the usual bootstrap.

    Paper: Bootstrap Methods: Another Look at the Jackknife (Annals of Statistics 1979); of clusters: Davison and
    Hinkley, Bootstrap Methods and Their Application (1997), section 3.8.

    Args:
        statistic: Maps the places of the rows of a resample, int64, to the figure. Its warnings are not shown.
        groups: The group of each row, integers, shape ``(N,)``.
        resamples: How often to draw, at least 1.
        confidence: Probability that the interval holds the true figure, in (0, 1).
        seed: Seed of the draws.

    Returns:
        Lower and upper end. NaN where there are fewer than two groups, which tell nothing of how groups differ, or the
        statistic is NaN in all resamples.

    Raises:
        ValueError: If an argument is out of its range.

    Warns:
        UserWarning: If resamples are left out because the statistic is NaN there.

    Example:
        >>> correct = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
        >>> mean = lambda rows: float(correct[rows].mean())
        >>> group_bootstrap_interval(mean, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]))
        (0.0, 1.0)

    """
    check_bootstrap(resamples, confidence)
    if groups.ndim != 1 or groups.is_floating_point():
        raise ValueError(
            f"Expected argument `groups` to be integers of shape (N,), but got {groups.dtype} of shape"
            f" {tuple(groups.shape)}."
        )
    _, place, sizes = groups.cpu().unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return math.nan, math.nan
    rows, starts = place.argsort(stable=True), sizes.cumsum(0) - sizes
    generator = torch.Generator().manual_seed(seed)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(resamples):
            drawn = torch.randint(len(sizes), (len(sizes),), generator=generator)
            lengths = sizes[drawn]
            # each drawn group's rows lie side by side: its start, and the place within it
            within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            values.append(float(statistic(rows[starts[drawn].repeat_interleave(lengths) + within])))
    found = torch.tensor(values, dtype=torch.float64)
    known = found[~found.isnan()]
    if len(known) < len(found):
        warnings.warn(
            f"{len(found) - len(known)} of {len(found)} resamples are left out: the figure does not exist for them.",
            stacklevel=2,
        )
    if not len(known):
        return math.nan, math.nan
    tail = (1.0 - confidence) / 2.0
    low, high = torch.quantile(known, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return low, high


def check_bootstrap(resamples: int, confidence: float) -> None:
    """Raise ValueError where there is no resample, or a confidence is not in (0, 1)."""
    if resamples < 1:
        raise ValueError(f"Expected argument `resamples` to be at least 1, but got {resamples}.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"Expected argument `confidence` to be in (0, 1), but got {confidence}.")
