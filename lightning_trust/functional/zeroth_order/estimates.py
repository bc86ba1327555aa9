"""Gradients from values alone: differences along random directions and along coordinates, and forward gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

#: What a random direction is drawn from.
Distribution = Literal["normal", "sphere", "rademacher"]
#: Which differences an estimate is made of.
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)


def forward_difference_gradient(
    value: Callable[[Tensor], Tensor], inputs: Tensor, directions: Iterable[Tensor], mu: float, base: Tensor
) -> Tensor:
    r"""Random-direction estimate of a gradient by one-sided differences (RGE).

    .. math:: \frac1q \sum_{j=1}^q \frac{L(x + \mu u_j) - L(x)}{\mu} \, u_j

    With standard normal or Rademacher directions its mean is :math:`\nabla L`, up to the curvature; with directions
    uniform on the unit sphere of :math:`\mathbb{R}^n` it is :math:`\nabla L / n`.

    Paper: signSGD via Zeroth-Order Oracle (ICLR 2019).

    Args:
        value: Inputs ``(N, ...)`` -> one value a sample, ``(N,)``.
        inputs: Where, shape ``(N, ...)``.
        directions: The :math:`u_j`, each of the shape of ``inputs``.
        mu: Length of a step, positive.
        base: Values at ``inputs``, shape ``(N,)``.

    Returns:
        Same shape as ``inputs``.

    Example:
        >>> square = lambda x: x.square().sum(dim=1)
        >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> units = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> forward_difference_gradient(square, x, units, 1e-4, square(x))
        tensor([[1.0000, 2.0000]], dtype=torch.float64)

    """
    slopes = [_along(direction, (value(inputs + mu * direction) - base) / mu) for direction in directions]
    return torch.stack(slopes).mean(dim=0)


def central_difference_gradient(
    value: Callable[[Tensor], Tensor], inputs: Tensor, directions: Iterable[Tensor], mu: float
) -> Tensor:
    r"""Random-direction estimate of a gradient by pairs of opposite points (central RGE, antithetic NES).

    .. math:: \frac1q \sum_{j=1}^q \frac{L(x + \mu u_j) - L(x - \mu u_j)}{2 \mu} \, u_j

    Exact along each direction where :math:`L` is quadratic. It costs two values a direction. Of a quadratic, and with
    one normal direction, the mean is :math:`\nabla L` and the mean square :math:`(n + 2) \Vert\nabla L\Vert^2`.

    Paper: Black-box Adversarial Attacks with Limited Queries and Information (ICML 2018).

    Args:
        value: Inputs ``(N, ...)`` -> one value a sample, ``(N,)``.
        inputs: Where, shape ``(N, ...)``.
        directions: The :math:`u_j`, each of the shape of ``inputs``.
        mu: Length of a step, positive.

    Returns:
        Same shape as ``inputs``.

    Example:
        >>> square = lambda x: x.square().sum(dim=1)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> central_difference_gradient(square, x, [torch.tensor([[0.6, 0.8]])], 0.5)
        tensor([[2.6400, 3.5200]])

    """
    slopes = [
        _along(direction, (value(inputs + mu * direction) - value(inputs - mu * direction)) / (2.0 * mu))
        for direction in directions
    ]
    return torch.stack(slopes).mean(dim=0)


def coordinate_gradient(
    value: Callable[[Tensor], Tensor],
    inputs: Tensor,
    mu: float,
    base: Tensor | None = None,
    coordinates: Iterable[int] | None = None,
) -> Tensor:
    r"""Coordinate-wise estimate of a gradient (CGE).

    .. math:: \hat g_i = \frac{L(x + \mu e_i) - L(x)}{\mu} \quad\text{or}\quad
        \hat g_i = \frac{L(x + \mu e_i) - L(x - \mu e_i)}{2 \mu}

    The one-sided differences, with ``base``, are off by :math:`\mu A_{ii} / 2` on a quadratic with matrix :math:`A`;
    the central ones are exact there.

    Paper: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training (ICLR 2024).

    Args:
        value: Inputs ``(N, ...)`` -> one value a sample, ``(N,)``.
        inputs: Where, shape ``(N, ...)``.
        mu: Length of a step, positive.
        base: Values at ``inputs``, shape ``(N,)``, for one-sided differences; central ones if None.
        coordinates: Flat indices into a sample; the others' estimate is 0. All if None.

    Returns:
        Same shape as ``inputs``.

    Example:
        >>> square = lambda x: x.square().sum(dim=1)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> coordinate_gradient(square, x, 0.5, base=square(x))
        tensor([[2.5000, 4.5000]])
        >>> coordinate_gradient(square, x, 0.5, coordinates=[1])
        tensor([[0., 4.]])

    """
    flat = inputs.flatten(1)
    estimate = torch.zeros_like(flat)
    for place in range(flat.shape[1]) if coordinates is None else coordinates:
        moved = flat.clone()
        moved[:, place] += mu
        above = value(moved.view_as(inputs))
        if base is not None:
            estimate[:, place] = (above - base) / mu
            continue
        moved[:, place] = flat[:, place] - mu
        estimate[:, place] = (above - value(moved.view_as(inputs))) / (2.0 * mu)
    return estimate.view_as(inputs)


def forward_gradient(value: Callable[[Tensor], Tensor], inputs: Tensor, directions: Iterable[Tensor]) -> Tensor:
    r"""Random-direction estimate of a gradient from forward-mode derivatives; there is no :math:`\mu`.

    .. math:: \frac1q \sum_{j=1}^q (\nabla L \cdot u_j) \, u_j

    Paper: Gradients without Backpropagation (arXiv:2202.08587).

    Args:
        value: Inputs ``(N, ...)`` -> one value a sample, ``(N,)``, made of operations with a forward derivative.
        inputs: Where, shape ``(N, ...)``.
        directions: The :math:`u_j`, each of the shape of ``inputs``.

    Returns:
        Same shape as ``inputs``.

    Example:
        >>> square = lambda x: x.square().sum(dim=1)
        >>> forward_gradient(square, torch.tensor([[1.0, 2.0]]), [torch.tensor([[0.6, 0.8]])])
        tensor([[2.6400, 3.5200]])

    """
    slopes = [_along(direction, torch.func.jvp(value, (inputs,), (direction,))[1]) for direction in directions]
    return torch.stack(slopes).mean(dim=0)


def draw_direction_(out: Tensor, distribution: Distribution, generator: Generator) -> Tensor:
    """Fill a tensor with a random direction, of which ``"sphere"`` is not yet scaled to length 1.

    A direction over several tensors is drawn tensor by tensor and, on the sphere, scaled by the norm of all of them
    together.

    Args:
        out: A floating tensor on the generator's device.
        distribution: ``"normal"``, ``"sphere"`` or ``"rademacher"``.
        generator: Where the numbers come from.

    Returns:
        The tensor.

    Example:
        >>> draw_direction_(torch.empty(3), "rademacher", torch.Generator().manual_seed(1)).abs()
        tensor([1., 1., 1.])

    """
    if distribution == "rademacher":
        return out.bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)
    return out.normal_(generator=generator)


def signal_to_noise(square: float, lost: float, sampling: float, rounding: float) -> float:
    r"""Signal-to-noise ratio of an estimate: the squared length of the gradient over the mean squared error.

    .. math:: \mathrm{SNR} = \frac{S}{\sigma S + \rho}, \qquad S = \max(\hat S - \rho_0, 0)

    An estimate that is made of rounding alone has the ratio 0.

    Args:
        square: :math:`\hat S`, the squared length as it was measured.
        lost: :math:`\rho_0`, what rounding adds to it.
        sampling: :math:`\sigma`, error of too few directions as a share of the squared length: :math:`(d + 1) / q` for
            :math:`q` normal directions in :math:`d` dimensions, 0 where all coordinates are asked.
        rounding: :math:`\rho`, squared error of the estimate by rounding.

    Example:
        >>> round(signal_to_noise(4.0, lost=0.0, sampling=101.0, rounding=0.0), 5)
        0.0099
        >>> signal_to_noise(1e-9, lost=1e-8, sampling=101.0, rounding=1e-6)
        0.0

    """
    signal = max(square - lost, 0.0)
    noise = sampling * signal + rounding
    if signal == 0.0:
        return 0.0
    return signal / noise if noise > 0.0 else math.inf


def _along(direction: Tensor, slope: Tensor) -> Tensor:
    return direction * slope.view(-1, *[1] * (direction.ndim - 1))
