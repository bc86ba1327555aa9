"""Partial differential equations with exact solutions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from lightning_trust.functional.zeroth_order import PointDerivatives

Network = Callable[[Tensor], Tensor]


class PDEProblem(ABC):
    r"""A partial differential equation of second order on a box, whose conditions hold by construction.

    A network :math:`N` is lifted to a function :math:`u` that meets initial, terminal and boundary conditions whatever
    the network, so that the residual in the box is all there is to train. Coordinates come first space, then time.

    Attributes:
        low: Lower corner of the box, one number a coordinate.
        high: Upper corner of the box.

    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @abstractmethod
    def lift(self, x: Tensor, net: Network) -> Tensor:
        """Values of the lifted network.

        Args:
            x: Points, shape ``(B, D)``; derivatives may ask for points a little outside of the box.
            net: Points -> values of the network, ``(B,)``.

        Returns:
            Shape ``(B,)``.

        """

    @abstractmethod
    def residual(self, x: Tensor, u: PointDerivatives) -> Tensor:
        """By how much a function misses the equation.

        Args:
            x: Points, shape ``(B, D)``.
            u: Value, gradient and second derivatives there.

        Returns:
            Shape ``(B,)``; 0 for a solution.

        """

    def exact(self, x: Tensor) -> Tensor:
        """The solution at points ``(B, D)``, shape ``(B,)``; a problem whose solution is not known leaves this out."""
        raise NotImplementedError(f"{type(self).__name__} has no exact solution.")

    @property
    def has_exact(self) -> bool:
        """Whether the solution is known."""
        return type(self).exact is not PDEProblem.exact

    @property
    def num_coordinates(self) -> int:
        """Number of coordinates, time included."""
        return len(self.low)

    def sample(self, rows: int, generator: Generator) -> Tensor:
        """Points drawn uniformly from the box, float32 of shape ``(rows, D)``."""
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return low + (high - low) * torch.rand(rows, self.num_coordinates, generator=generator)


class HJB20(PDEProblem):
    r"""A Hamilton-Jacobi-Bellman equation in many dimensions, 20 by default.

    .. math:: u_t + \Delta u - \tfrac1d \|\nabla u\|^2 = -2 \text{ on } [0, 1]^d \times [0, 1], \qquad
        u(x, 1) = \|x\|_1

    with the solution :math:`u = \|x\|_1 + 1 - t`. The lift is :math:`u = \sum_i x_i + (1 - t) N(x, t)`, so that the
    network has a constant to learn, 1: even an untrained one is not far off, and a small error says little.

    Paper: Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks (arXiv 2308.09858).

    Args:
        dim: Number of dimensions :math:`d` of space; with time there is one coordinate more.

    Raises:
        ValueError: If ``dim`` is below 1.

    Example:
        >>> problem = HJB20()
        >>> x = torch.full((1, 21), 0.25)
        >>> problem.exact(x)
        tensor([5.7500])
        >>> problem.lift(x, lambda points: torch.ones(len(points)))
        tensor([5.7500])

    """

    def __init__(self, dim: int = 20) -> None:
        _check_dim(dim)
        self.dim = dim
        self.low, self.high = (0.0,) * (dim + 1), (1.0,) * (dim + 1)

    def lift(self, x: Tensor, net: Network) -> Tensor:
        """Meets the terminal condition."""
        return x[:, :-1].sum(dim=1) + (1.0 - x[:, -1]) * net(x)

    def residual(self, x: Tensor, u: PointDerivatives) -> Tensor:
        """Left side of the equation, and 2."""
        space = u.gradient[:, :-1]
        return u.gradient[:, -1] + u.second[:, :-1].sum(dim=1) - space.square().sum(dim=1) / self.dim + 2.0

    def exact(self, x: Tensor) -> Tensor:
        """The sum of the coordinates of space, and the time that is left."""
        return x[:, :-1].abs().sum(dim=1) + 1.0 - x[:, -1]


class BlackScholes1D(PDEProblem):
    r"""The price of a European call option on one asset.

    .. math:: u_t + \tfrac12 \sigma^2 s^2 u_{ss} + r s u_s - r u = 0

    for the price :math:`s` of the asset and that of the option :math:`u`, both in units of ``highest``, so that
    :math:`s \in [0, 1]`, and time :math:`t \in [0, \text{horizon}]` in years. The terminal condition is the price of
    the option at ``horizon``, before it matures: at maturity it has a kink, whose second derivative no network has. The
    lift is

    .. math:: u = c(s, h) + s \, (c(1, t) - c(1, h)) + (h - t) \, s (1 - s) \, N(s, t)

    with :math:`c` the formula of Black and Scholes and :math:`h` the horizon.

    Paper: The Pricing of Options and Corporate Liabilities (Journal of Political Economy 1973).

    Args:
        strike: Price at which the asset may be bought at maturity.
        rate: Interest a year, :math:`r`.
        volatility: Of the asset, a year, :math:`\sigma`.
        maturity: Years until the option matures.
        highest: Largest price of the asset.
        horizon: Years until the terminal condition; less than ``maturity``.

    Raises:
        ValueError: If a number is not positive, or ``horizon`` is not less than ``maturity``.

    Example:
        >>> problem = BlackScholes1D()
        >>> price = problem.exact(torch.tensor([[0.5, 0.0]]))  # an asset of 100
        >>> round(200 * price.item(), 2)
        10.45

    """

    def __init__(
        self,
        strike: float = 100.0,
        rate: float = 0.05,
        volatility: float = 0.2,
        maturity: float = 1.0,
        highest: float = 200.0,
        horizon: float = 0.75,
    ) -> None:
        numbers = {"strike": strike, "volatility": volatility, "highest": highest, "horizon": horizon}
        for name, value in numbers.items():
            if not value > 0.0:
                raise ValueError(f"Expected argument `{name}` to be positive, but got {value}.")
        if not horizon < maturity:
            raise ValueError(f"Expected argument `horizon` to be less than maturity={maturity}, but got {horizon}.")
        self.strike = strike / highest
        self.rate = rate
        self.volatility = volatility
        self.maturity = maturity
        self.horizon = horizon
        self.low, self.high = (0.0, 0.0), (1.0, horizon)

    def lift(self, x: Tensor, net: Network) -> Tensor:
        """Meets the terminal condition, and those at the prices 0 and ``highest``."""
        s, t = x[:, 0], x[:, 1]
        one, end = torch.ones_like(s), torch.full_like(t, self.horizon)
        fixed = self._call(s, end) + s * (self._call(one, t) - self._call(one, end))
        return fixed + (self.horizon - t) * s * (1.0 - s) * net(x)

    def residual(self, x: Tensor, u: PointDerivatives) -> Tensor:
        """Left side of the equation."""
        s = x[:, 0]
        diffusion = 0.5 * self.volatility**2 * s.square() * u.second[:, 0]
        return u.gradient[:, 1] + diffusion + self.rate * (s * u.gradient[:, 0] - u.value)

    def exact(self, x: Tensor) -> Tensor:
        """The formula of Black and Scholes, in units of ``highest``."""
        return self._call(x[:, 0], x[:, 1])

    def _call(self, s: Tensor, t: Tensor) -> Tensor:
        # points a little outside of the box: prices below 0, and times after maturity
        s, left = s.clamp(min=1e-12), (self.maturity - t).clamp(min=1e-6)
        spread = self.volatility * left.sqrt()
        high = ((s / self.strike).log() + (self.rate + 0.5 * self.volatility**2) * left) / spread
        bond = self.strike * (-self.rate * left).exp()
        return s * torch.special.ndtr(high) - bond * torch.special.ndtr(high - spread)


class Poisson(PDEProblem):
    r"""Poisson's equation on the unit cube with zero boundary, whose solution has two frequencies.

    .. math:: \Delta u = f \text{ on } [0, 1]^d, \qquad u = 0 \text{ on the boundary}, \qquad
        u = \prod_i \sin(\pi x_i) + \tfrac12 \prod_i \sin(2 \pi x_i)

    The lift is :math:`u = \prod_i 4 x_i (1 - x_i) \, N(x)`. No constant :math:`N` comes nearer than 45 %.

    Args:
        dim: Number of dimensions :math:`d`.

    Raises:
        ValueError: If ``dim`` is below 1.

    Example:
        >>> problem = Poisson(2)
        >>> x = torch.tensor([[0.5, 0.5], [0.25, 0.25]])
        >>> problem.exact(x)
        tensor([1., 1.])

    """

    def __init__(self, dim: int = 2) -> None:
        _check_dim(dim)
        self.dim = dim
        self.low, self.high = (0.0,) * dim, (1.0,) * dim

    def lift(self, x: Tensor, net: Network) -> Tensor:
        """Meets the boundary condition."""
        return _bubble(x) * net(x)

    def residual(self, x: Tensor, u: PointDerivatives) -> Tensor:
        r"""The Laplacian, less :math:`f`."""
        slow, fast = _waves(x)
        return u.second.sum(dim=1) + self.dim * math.pi**2 * (slow + 4.0 * 0.5 * fast)

    def exact(self, x: Tensor) -> Tensor:
        """Two products of sines."""
        slow, fast = _waves(x)
        return slow + 0.5 * fast


class Heat(PDEProblem):
    r"""The heat equation on the unit cube with zero boundary, whose solution has two frequencies.

    .. math:: u_t = \kappa \, \Delta u \text{ on } [0, 1]^d \times [0, 1], \qquad
        u(x, t) = e^{-\kappa d \pi^2 t} \prod_i \sin(\pi x_i) + \tfrac12 e^{-4 \kappa d \pi^2 t} \prod_i \sin(2 \pi x_i)

    The lift is :math:`u = u(x, 0) + t \prod_i 4 x_i (1 - x_i) \, N(x, t)`.

    Args:
        dim: Number of dimensions :math:`d` of space; with time there is one coordinate more.
        diffusivity: :math:`\kappa`.

    Raises:
        ValueError: If ``dim`` is below 1 or ``diffusivity`` is not positive.

    Example:
        >>> problem = Heat(1)
        >>> problem.exact(torch.tensor([[0.5, 0.0], [0.5, 1.0]]))
        tensor([1.0000, 0.6105])

    """

    def __init__(self, dim: int = 1, diffusivity: float = 0.05) -> None:
        _check_dim(dim)
        if not diffusivity > 0.0:
            raise ValueError(f"Expected argument `diffusivity` to be positive, but got {diffusivity}.")
        self.dim = dim
        self.diffusivity = diffusivity
        self.low, self.high = (0.0,) * (dim + 1), (1.0,) * (dim + 1)

    def lift(self, x: Tensor, net: Network) -> Tensor:
        """Meets the initial and the boundary condition."""
        slow, fast = _waves(x[:, :-1])
        return slow + 0.5 * fast + x[:, -1] * _bubble(x[:, :-1]) * net(x)

    def residual(self, x: Tensor, u: PointDerivatives) -> Tensor:
        """Change in time, less what diffuses."""
        return u.gradient[:, -1] - self.diffusivity * u.second[:, :-1].sum(dim=1)

    def exact(self, x: Tensor) -> Tensor:
        """Two products of sines that decay."""
        slow, fast = _waves(x[:, :-1])
        decay = (-self.diffusivity * self.dim * math.pi**2 * x[:, -1]).exp()
        return decay * slow + 0.5 * decay**4 * fast


def _waves(x: Tensor) -> tuple[Tensor, Tensor]:
    return (math.pi * x).sin().prod(dim=1), (2.0 * math.pi * x).sin().prod(dim=1)


def _bubble(x: Tensor) -> Tensor:
    return (4.0 * x * (1.0 - x)).prod(dim=1)


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"Expected argument `dim` to be a positive integer, but got {dim}.")
