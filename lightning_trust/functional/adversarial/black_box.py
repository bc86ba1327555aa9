"""Gradients of a black box, from values alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def forward_difference_gradient(
    value: Callable[[Tensor], Tensor], inputs: Tensor, directions: Iterable[Tensor], mu: float, base: Tensor
) -> Tensor:
    r"""Random-direction estimate of a gradient by one-sided differences.

    .. math:: \frac1q \sum_{j=1}^q \frac{L(x + \mu u_j) - L(x)}{\mu} \, u_j

    With directions uniform on the unit sphere of :math:`\mathbb{R}^n` its mean is :math:`\nabla L / n`, up to the
    curvature.

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


def antithetic_gradient(
    value: Callable[[Tensor], Tensor], inputs: Tensor, directions: Iterable[Tensor], mu: float
) -> Tensor:
    r"""Random-direction estimate of a gradient by pairs of opposite points (NES).

    .. math:: \frac{1}{m} \sum_{j=1}^m \frac{L(x + \mu u_j) - L(x - \mu u_j)}{2 \mu} \, u_j

    Exact along each direction where :math:`L` is quadratic. It costs two values a direction.

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
        >>> antithetic_gradient(square, x, [torch.tensor([[0.6, 0.8]])], 0.5)
        tensor([[2.6400, 3.5200]])

    """
    slopes = [
        _along(direction, (value(inputs + mu * direction) - value(inputs - mu * direction)) / (2.0 * mu))
        for direction in directions
    ]
    return torch.stack(slopes).mean(dim=0)


def dct_matrix(size: int) -> Tensor:
    r"""The orthonormal basis of the discrete cosine transform (type II): one basis vector a row, slowest first.

    Args:
        size: Length of a vector.

    Returns:
        Float32, shape ``(size, size)``.

    Example:
        >>> basis = dct_matrix(4)
        >>> torch.allclose(basis @ basis.T, torch.eye(4), atol=1e-6)
        True

    """
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    place = torch.arange(size, dtype=torch.float64)[None]
    basis = torch.cos(torch.pi * frequency * (2.0 * place + 1.0) / (2.0 * size)) * (2.0 / size) ** 0.5
    basis[0] /= 2.0**0.5
    return basis.float()


def _along(direction: Tensor, slope: Tensor) -> Tensor:
    return direction * slope.view(-1, *[1] * (direction.ndim - 1))
