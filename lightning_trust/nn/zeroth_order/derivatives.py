"""Derivatives of a network in its inputs, from its values."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_trust.core.randomness import RandomStreams
from lightning_trust.functional.zeroth_order import (
    PointDerivatives,
    count_grid_nodes,
    smolyak_gauss_hermite,
    smoothed_derivatives,
)
from lightning_trust.functional.zeroth_order.sparse_grid import MOST_NODES

Function = Callable[[Tensor], Tensor]


class DerivativeEstimator(ABC):
    """Value, gradient and diagonal of the Hessian of a function of points; what a residual of a PDE is made of.

    Called with a function, ``(rows, D)`` -> ``(rows,)`` or ``(rows, 1)``, and points ``(B, D)``, an estimator gives a
    :class:`~lightning_trust.functional.zeroth_order.PointDerivatives` in the type of the points. The function is
    evaluated in whatever precision it has; differences and sums are in float64. Points in float64 keep what the
    function computes outside of a float32 network from being rounded.

    Gradients in parameters flow through the result unless they are switched off, and nothing but
    :class:`AutogradDerivatives` needs them on.

    Attributes:
        calls: How often the estimator was called.
        evaluations: Of how many points the function was asked, in all calls. A call that ``torch.func.vmap`` makes for
            many networks at a time counts once.

    """

    #: Most points that the function is asked of at a time; more are asked in parts.
    max_rows = 65_536

    def __init__(self) -> None:
        self.calls = 0
        self.evaluations = 0

    @abstractmethod
    def __call__(self, f: Function, x: Tensor, key: int | None = None) -> PointDerivatives:
        """Derivatives at points.

        Args:
            f: The function.
            x: Shape ``(B, D)``.
            key: Places random draws in a run; equal keys, equal draws. The number of calls so far if None.

        """

    @abstractmethod
    def value(self, f: Function, x: Tensor, key: int | None = None) -> Tensor:
        """The function whose derivatives these are, ``(B,)``: smoothed, where the estimator smooths."""

    @abstractmethod
    def points_per_point(self, dim: int) -> int:
        """Of how many points the function is asked for the derivatives at one."""

    def _asked(self, f: Function, points: Tensor) -> Tensor:
        """Values at points ``(..., D)``, float64 of shape ``(...)``."""
        rows = points.reshape(-1, points.shape[-1])
        self.evaluations += len(rows)
        values = []
        for part in rows.split(self.max_rows):
            value = f(part)
            if value.numel() != len(part):
                raise ValueError(
                    f"Expected argument `f` to give one value a point, but for points of shape {tuple(part.shape)} got"
                    f" {tuple(value.shape)}."
                )
            values.append(value.reshape(-1).double())
        return torch.cat(values).reshape(points.shape[:-1])

    def _begin(self, x: Tensor) -> None:
        if x.ndim != 2:
            raise ValueError(f"Expected argument `x` to be of shape (B, D), but got {tuple(x.shape)}.")
        self.calls += 1


class SparseGridDerivatives(DerivativeEstimator):
    r"""Derivatives of a smoothed function, from its values on a sparse grid around each point.

    The function is smoothed with a normal of standard deviation :math:`\sigma`,
    :math:`u_\sigma(x) = \mathbb{E} f(x + \sigma \delta)`. By Stein's identity its derivatives are expectations of
    values of :math:`f`, which a Smolyak grid of Gauss-Hermite nodes stands in for: :math:`2 D^2 + 2 D + 1` nodes at
    level 3. See :func:`~lightning_trust.functional.zeroth_order.smoothed_derivatives`.

    Two errors are left. Smoothing itself: a wave :math:`\sin(k x)` is damped by :math:`e^{-k^2 \sigma^2 / 2}`. And the
    grid: level :math:`L` is exact for :math:`\delta_i^2 f` of total degree :math:`2 L - 1` only, which matters where
    :math:`f` changes much within :math:`\sigma` or along all of many dimensions; :meth:`compare_levels` looks. At level
    3 the error of the grid takes back a part of that of smoothing, so that a network trained on it may itself be nearer
    to a solution than its smoothed values. Rounding of :math:`f` is made larger by :math:`\sum_j |w_j| / \sigma^2`,
    84,100 in 21 dimensions at :math:`\sigma = 0.1`.

    Paper: Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks (arXiv 2308.09858).

    Args:
        dim: Number of coordinates :math:`D`, time included.
        level: 3 to 5. Grids of levels 1 and 2 are not exact for the second derivatives of any quadratic.
        sigma: Standard deviation of the smoothing, in the units of the coordinates.

    Raises:
        ValueError: If an argument is out of its range, or the grid would have more than 50,000 nodes.

    Example:
        >>> derivatives = SparseGridDerivatives(dim=2)
        >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> value, gradient, second = derivatives(lambda z: z.pow(3).sum(dim=1), x)
        >>> gradient.round(decimals=6)  # 3 x^2 + 3 sigma^2
        tensor([[ 3.0300, 12.0300]], dtype=torch.float64)
        >>> derivatives.evaluations
        13

    """

    def __init__(self, dim: int, level: int = 3, sigma: float = 0.1) -> None:
        super().__init__()
        _check_positive("sigma", sigma)
        if level in (1, 2):
            raise ValueError(
                f"Expected argument `level` to be 3, 4 or 5, but got {level}: grids of level 1 and 2 are not exact for"
                " the second derivatives of any quadratic."
            )
        self.nodes, self.weights = smolyak_gauss_hermite(dim, level)
        self.dim = dim
        self.level = level
        self.sigma = sigma

    def __call__(self, f: Function, x: Tensor, key: int | None = None) -> PointDerivatives:
        """Derivatives of the smoothed function at points ``(B, D)``."""
        self._begin(x)
        return _typed(smoothed_derivatives(self._values(f, x), self.nodes, self.weights, self.sigma), x)

    def value(self, f: Function, x: Tensor, key: int | None = None) -> Tensor:
        """The smoothed function at points ``(B, D)``."""
        return (self._values(f, x) @ self.weights).to(x.dtype)

    def points_per_point(self, dim: int) -> int:
        """Number of nodes."""
        return len(self.nodes)

    def compare_levels(self, f: Function, x: Tensor, tolerance: float = 0.1) -> float:
        r"""How far the derivatives of this level are from those of the next.

        At level 5, and where the next grid would be too large, the level below is compared with, if that is 3 or more.

        Args:
            f: The function.
            x: Some points, shape ``(B, D)``; a few will do.
            tolerance: From what on there is a warning.

        Returns:
            The larger of :math:`\|g - g'\| / \|g'\|` for gradients and
            :math:`\|s - s'\| / (\|s'\| + 0.01 \|g'\| / \sigma)` for second derivatives, over all points.

        Raises:
            ValueError: If there is no level to compare with.

        Warns:
            UserWarning: If the two differ by more than ``tolerance``.

        Example:
            >>> derivatives = SparseGridDerivatives(dim=2)
            >>> round(derivatives.compare_levels(lambda z: z.sin().sum(dim=1), torch.ones(1, 2).double()), 3)
            0.003

        """
        level = self.other_level()
        if level is None:
            raise ValueError(
                f"Expected a grid of another level for dim={self.dim} and level={self.level} to have at most"
                f" {MOST_NODES} nodes, but there is none to compare with."
            )
        other = SparseGridDerivatives(self.dim, level, self.sigma)
        with torch.no_grad():
            found, against = self(f, x.double()), other(f, x.double())
        self.evaluations += other.evaluations
        slope, curvature = against.gradient.norm(), against.second.norm()
        # second derivatives that change the gradient by less than 1 % within sigma may be nothing but rounding
        sizes = torch.stack([slope, curvature + 0.01 * slope / self.sigma])
        errors = torch.stack([(found.gradient - against.gradient).norm(), (found.second - against.second).norm()])
        difference = torch.where(errors == 0.0, 0.0, errors / sizes).max().item()
        if not difference <= tolerance:
            warnings.warn(
                f"Derivatives from sparse grids of level {self.level} and {level} differ by {difference:.0%}: the"
                f" function changes too much within sigma={self.sigma} (lower `sigma` or raise `level`), or its values"
                " are rounded too coarsely (raise `sigma`, or compute in float64).",
                stacklevel=2,
            )
        return difference

    def other_level(self) -> int | None:
        """The level that :meth:`compare_levels` compares with, None if there is none."""
        if self.level < 5 and count_grid_nodes(self.dim, self.level + 1) <= MOST_NODES:
            return self.level + 1
        return self.level - 1 if self.level > 3 else None

    def _values(self, f: Function, x: Tensor) -> Tensor:
        if x.shape[1:] != (self.dim,):
            raise ValueError(
                f"Expected argument `x` to be of shape (B, {self.dim}), for dim={self.dim}, but got {tuple(x.shape)}."
            )
        if self.nodes.device != x.device:
            self.nodes, self.weights = self.nodes.to(x.device), self.weights.to(x.device)
        return self._asked(f, (x.double()[:, None] + self.sigma * self.nodes).to(x.dtype))


class SteinDerivatives(DerivativeEstimator):
    r"""Derivatives of a smoothed function, from its values at random points around each point.

    .. math:: \partial_i u = \mathbb{E} \frac{e_i}{2 \sigma^2} \big(f(x + e) - f(x - e)\big), \qquad
        \partial_i^2 u = \mathbb{E} \frac{e_i^2 - \sigma^2}{2 \sigma^4} \big(f(x + e) + f(x - e) - 2 f(x)\big), \qquad
        e \sim \mathcal{N}(0, \sigma^2 I)

    Each point has draws of its own, keyed by (seed, ``key``, place of the point in the global batch).

    Paper: Learning Physics-Informed Neural Networks without Stacked Back-propagation (AISTATS 2023).

    Args:
        n: Number of draws a point; each takes two evaluations.
        sigma: Standard deviation of the smoothing, in the units of the coordinates.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> derivatives = SteinDerivatives(n=512)
        >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> value, gradient, second = derivatives(lambda z: z.square().sum(dim=1), x)
        >>> gradient.shape, derivatives.evaluations
        (torch.Size([1, 2]), 1025)

    """

    def __init__(self, n: int = 1024, sigma: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"Expected argument `n` to be a positive integer, but got {n}.")
        _check_positive("sigma", sigma)
        self.n = n
        self.sigma = sigma
        self.seed = seed

    def __call__(self, f: Function, x: Tensor, key: int | None = None) -> PointDerivatives:
        """Derivatives of the smoothed function at points ``(B, D)``."""
        nodes = self._nodes(x, key)
        self._begin(x)
        values = self._around(f, x, nodes)
        weights = torch.full((2 * self.n,), 0.5 / self.n, dtype=torch.float64, device=x.device)
        return _typed(smoothed_derivatives(values, nodes, weights, self.sigma, self._asked(f, x)), x)

    def value(self, f: Function, x: Tensor, key: int | None = None) -> Tensor:
        """The smoothed function at points ``(B, D)``."""
        return self._around(f, x, self._nodes(x, key)).mean(dim=1).to(x.dtype)

    def points_per_point(self, dim: int) -> int:
        """Two a draw, and the point."""
        return 2 * self.n + 1

    def _nodes(self, x: Tensor, key: int | None) -> Tensor:
        streams = RandomStreams(self.seed, type(self).__qualname__)
        draws = streams.samples(len(x), self.calls if key is None else key, device=x.device)
        half = draws.normal(self.n, x.shape[1]).double()
        return torch.cat([half, -half], dim=1)

    def _around(self, f: Function, x: Tensor, nodes: Tensor) -> Tensor:
        return self._asked(f, (x.double()[:, None] + self.sigma * nodes).to(x.dtype))


class FiniteDifference(DerivativeEstimator):
    r"""Central differences.

    .. math:: \partial_i f \approx \frac{f(x + h e_i) - f(x - h e_i)}{2 h}, \qquad
        \partial_i^2 f \approx \frac{f(x + h e_i) + f(x - h e_i) - 2 f(x)}{h^2}

    Off by :math:`O(h^2)`, and by the rounding of :math:`f` over :math:`h^2` in second derivatives. It takes
    :math:`2 D + 1` evaluations a point.

    Args:
        h: Length of a step, in the units of the coordinates.

    Raises:
        ValueError: If ``h`` is not positive.

    Example:
        >>> derivatives = FiniteDifference()
        >>> derivatives(lambda z: z.square().sum(dim=1), torch.tensor([[1.0, 2.0]], dtype=torch.float64)).gradient
        tensor([[2.0000, 4.0000]], dtype=torch.float64)

    """

    def __init__(self, h: float = 1e-2) -> None:
        super().__init__()
        _check_positive("h", h)
        self.h = h

    def __call__(self, f: Function, x: Tensor, key: int | None = None) -> PointDerivatives:
        """Differences at points ``(B, D)``."""
        self._begin(x)
        dim = x.shape[1]
        steps = self.h * torch.eye(dim, dtype=torch.float64, device=x.device)
        steps = torch.cat([steps, -steps, torch.zeros_like(steps[:1])])
        values = self._asked(f, (x.double()[:, None] + steps).to(x.dtype))
        ahead, behind, here = values.split([dim, dim, 1], dim=1)
        gradient = (ahead - behind) / (2.0 * self.h)
        return _typed(PointDerivatives(here[:, 0], gradient, (ahead + behind - 2.0 * here) / self.h**2), x)

    def value(self, f: Function, x: Tensor, key: int | None = None) -> Tensor:
        """The function itself at points ``(B, D)``."""
        return self._asked(f, x).to(x.dtype)

    def points_per_point(self, dim: int) -> int:
        """Two a coordinate, and the point."""
        return 2 * dim + 1


class AutogradDerivatives(DerivativeEstimator):
    """Exact derivatives by automatic differentiation, what the other estimators are measured against.

    One forward, one backward, and one backward through it for each coordinate. It works wherever it is called, under
    ``no_grad`` and inference mode too.

    Example:
        >>> derivatives = AutogradDerivatives()
        >>> with torch.no_grad():
        ...     value, gradient, second = derivatives(lambda z: z.pow(3).sum(dim=1), torch.tensor([[1.0, 2.0]]))
        >>> gradient, second
        (tensor([[ 3., 12.]]), tensor([[ 6., 12.]]))

    """

    def __call__(self, f: Function, x: Tensor, key: int | None = None) -> PointDerivatives:
        """Derivatives at points ``(B, D)``."""
        self._begin(x)
        outside = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            # a copy: tensors that were made in inference mode take part in no graph
            points = x.detach().clone().requires_grad_()
            value = self._asked(f, points)
            gradient = self._gradient(value.sum(), points, create_graph=True)
            columns = [
                self._gradient(gradient[:, i].sum(), points, create_graph=outside)[:, i] for i in range(x.shape[1])
            ]
            found = PointDerivatives(value, gradient, torch.stack(columns, dim=1))
        return _typed(found if outside else PointDerivatives(*(each.detach() for each in found)), x)

    def value(self, f: Function, x: Tensor, key: int | None = None) -> Tensor:
        """The function itself at points ``(B, D)``."""
        return self._asked(f, x).to(x.dtype)

    def points_per_point(self, dim: int) -> int:
        """The point."""
        return 1

    @staticmethod
    def _gradient(output: Tensor, points: Tensor, create_graph: bool) -> Tensor:
        if not output.requires_grad:
            return torch.zeros_like(points)
        (gradient,) = torch.autograd.grad(
            output, points, create_graph=create_graph, retain_graph=True, materialize_grads=True
        )
        return gradient


def _typed(found: PointDerivatives, x: Tensor) -> PointDerivatives:
    return PointDerivatives(*(each.to(x.dtype) for each in found))


def _check_positive(name: str, value: float) -> None:
    if not value > 0.0:
        raise ValueError(f"Expected argument `{name}` to be positive, but got {value}.")
