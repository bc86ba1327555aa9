"""Random gradient estimation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_trust.core.randomness import derived_seed
from lightning_trust.functional.zeroth_order import DISTRIBUTIONS, Distribution, signal_to_noise
from lightning_trust.optim.zeroth_order.directions import SeededDirections
from lightning_trust.optim.zeroth_order.estimator import GradientEstimator
from lightning_trust.optim.zeroth_order.oracle import (
    Estimate,
    LossOracle,
    check_count,
    check_finite,
    check_mu,
    resolution,
)


class RGE(GradientEstimator):
    r"""Random gradient estimation: differences of the loss along random directions over all weights.

    .. math:: \hat g = \frac1q \sum_{j=1}^q \frac{l(\theta + \mu u_j) - l(\theta - \mu u_j)}{2 \mu} \, u_j
        \quad\text{or}\quad \frac1q \sum_{j=1}^q \frac{l(\theta + \mu u_j) - l(\theta)}{\mu} \, u_j

    with :math:`u_j` standard normal, of random signs, or uniform on the unit sphere and then multiplied by the number
    of weights :math:`d`: the mean is the gradient, up to the curvature. The mean squared error is about
    :math:`(d + 1) / q` times the squared length of the gradient. Directions are drawn again from their seeds wherever
    they are needed, in the memory of the largest parameter, and weights are moved in place.

    Papers: Stochastic First- and Zeroth-Order Methods for Nonconvex Stochastic Programming (SIAM J. Optim. 2013);
    Fine-Tuning Language Models with Just Forward Passes (MeZO, NeurIPS 2023, arXiv:2305.17333).

    Args:
        q: Number of directions :math:`q`.
        mu: Length :math:`\mu` of a difference.
        central: Whether differences are central, at ``2 q`` queries, or one-sided, at ``q + 1``.
        distribution: ``"normal"``, ``"sphere"`` or ``"rademacher"``.
        exact_restore: Whether weights come back bit for bit, from a copy of all of them; otherwise up to the rounding
            of a few additions.
        normalize: ``"per_tensor"`` divides the part of a direction in each parameter by its own length, with no factor
            for it: the estimate is then no longer that of the gradient, for the mean of the part in a parameter of
            :math:`n` entries is its gradient over :math:`n`, and its signal to noise is given as nan. It is what the
            released code of DeepZero ranks layers by.

    Raises:
        ValueError: If an argument is out of its range, or ``normalize`` is given for directions on the sphere.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> estimator = RGE(q=2000, mu=0.1, distribution="rademacher")
        >>> found = estimator.estimate(lambda: weight.square().sum(), [weight], torch.Generator().manual_seed(1))
        >>> found.queries, (weight.grad - 2 * weight.data).norm() < 0.2
        (4000, tensor(True))

    """

    def __init__(
        self,
        q: int = 1,
        mu: float = 1e-3,
        central: bool = True,
        distribution: Distribution = "normal",
        exact_restore: bool = False,
        normalize: Literal["per_tensor"] | None = None,
    ) -> None:
        check_count("q", q)
        check_mu(mu)
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"Expected argument `distribution` to be one of {list(DISTRIBUTIONS)}, but got {distribution!r}."
            )
        if normalize not in (None, "per_tensor"):
            raise ValueError(f"Expected argument `normalize` to be 'per_tensor' or None, but got {normalize!r}.")
        if normalize is not None and distribution == "sphere":
            raise ValueError(
                "Expected argument `normalize` to be None where directions lie on the sphere over all parameters, but"
                f" got {normalize!r}."
            )
        self.q = q
        self.mu = mu
        self.central = central
        self.distribution: Distribution = distribution
        self.exact_restore = exact_restore
        self.normalize = normalize

    def add(self, oracle: LossOracle, scale: float = 1.0) -> Estimate:
        """Add ``scale`` times the estimate to the ``.grad`` of the oracle's parameters."""
        slopes = self.slopes(oracle)
        for seed, factor in zip(slopes.seeds, slopes.factors(), strict=True):
            slopes.directions.add_to_gradients(seed, scale * factor)
        return slopes.estimate

    @property
    def _kind(self) -> tuple[bool, bool]:
        return self.central, self.distribution == "normal"

    def slopes(self, oracle: LossOracle) -> Slopes:
        """The derivatives along the directions, which are all there is to know of the estimate."""
        directions = SeededDirections(oracle.parameters, self.distribution, oracle.masks, self.normalize is not None)
        # ranks that move along different directions would part by the rounding of the way back
        exact = self.exact_restore or oracle.splits
        kept = {name: value.detach().clone() for name, value in oracle.parameters.items()} if exact else {}
        seeds = [derived_seed(oracle.seed, place) for place in range(self.q)]
        lengths = [directions.length(seed) for seed in seeds]
        base = None if self.central else oracle.base()
        found: list[Tensor] = []
        levels: list[Tensor] = []
        for place in range(self.q)[oracle.share(self.q)]:
            step = self.mu / lengths[place]
            moved = 0.0
            try:
                directions.move(seeds[place], step)
                moved = step
                above = oracle()
                if base is None:
                    directions.move(seeds[place], -2.0 * step)
                    moved = -step
                    below = oracle()
                    found.append((above - below) / (2.0 * self.mu))
                    levels.append((above + below) / 2.0)
                else:
                    found.append((above - base) / self.mu)
            finally:
                # also where the loss fails: the weights are the user's
                if kept:
                    _restore(oracle, kept)
                elif moved:
                    directions.move(seeds[place], -moved)
        values = torch.stack(found) if found else torch.zeros(0, device=oracle.device)
        values = oracle.combined(values, self.q)
        check_finite(values, lambda place: f"along direction {place + 1} of {self.q} (mu={self.mu:g})")
        loss = base if base is not None else torch.stack(levels).mean() if levels else values.new_zeros(())
        # on the sphere an entry has the variance 1 / d
        factor = oracle.dimensions if self.distribution == "sphere" else 1
        snr = slopes_snr(values * factor**0.5, oracle.dimensions, self.mu / factor**0.5, loss, *self._kind)
        if self.normalize is not None:
            snr = float("nan")
        return Slopes(directions, seeds, lengths, values, factor, oracle.estimate(loss, snr))


@dataclass(frozen=True)
class Slopes:
    r"""Derivatives of a loss along random directions.

    Attributes:
        directions: What the seeds stand for.
        seeds: The directions.
        lengths: What each is divided by.
        values: The derivatives :math:`c_j` along the directions of that length.
        dimensions: What the estimate is multiplied by: the number of weights on the sphere, else 1.
        estimate: What they cost.

    """

    directions: SeededDirections
    seeds: list[int]
    lengths: list[float]
    values: Tensor
    dimensions: int
    estimate: Estimate

    def factors(self, values: Tensor | None = None) -> list[float]:
        """What each direction as it is drawn is multiplied by in the estimate, or in one of other derivatives."""
        slopes = (self.values if values is None else values).tolist()
        count = len(slopes)
        return [self.dimensions * slope / (count * own) for slope, own in zip(slopes, self.lengths, strict=True)]


def slopes_snr(
    values: Tensor, dimensions: int, mu: float, loss: Tensor, central: bool = True, normal: bool = True
) -> float:
    """Signal-to-noise ratio of an estimate from derivatives along directions whose entries have the variance 1.

    Args:
        values: The derivatives.
        dimensions: Number of weights.
        mu: Length of a difference along such a direction.
        loss: A loss, for its size and precision.
        central: Whether the differences are central.
        normal: Whether the directions are normal; their length is fixed otherwise.

    """
    lost = (0.5 if central else 2.0) * (resolution(loss) / mu) ** 2
    spread = dimensions + 1 if normal else max(dimensions - 1, 0)
    count = len(values)
    return signal_to_noise(float(values.square().mean()), lost, spread / count, dimensions * lost / count)


@torch.no_grad()
def _restore(oracle: LossOracle, kept: dict[str, Tensor]) -> None:
    for name, value in kept.items():
        oracle.parameters[name].data.copy_(value)
