"""How far an accuracy that was measured on n samples can be trusted."""

from __future__ import annotations


def wilson_interval(successes: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Wilson score interval of a share.

    .. math:: \frac{1}{1 + z^2 / n} \Big( \hat p + \frac{z^2}{2n} \pm
        z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}} \Big)

    Paper: Probable Inference, the Law of Succession, and Statistical Inference (JASA 1927); computed by SciPy.

    Args:
        successes: How many, in [0, samples].
        samples: Out of how many, at least 1.
        confidence: Probability that the interval holds the true share.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: If the numbers do not fit.

    Example:
        >>> low, high = wilson_interval(45, 50)
        >>> round(low, 3), round(high, 3)
        (0.786, 0.957)

    """
    if samples < 1 or not 0 <= successes <= samples:
        raise ValueError(f"Expected 0 <= successes <= samples and samples >= 1, but got {successes} of {samples}.")
    from scipy.stats import binomtest

    interval = binomtest(successes, samples).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
