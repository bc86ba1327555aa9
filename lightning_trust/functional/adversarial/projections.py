"""Projections onto norm balls, and the steps that raise a linear function most."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")


def check_norm(norm: str) -> None:
    """Raise ValueError where a norm has another name."""
    if norm not in NORMS:
        raise ValueError(f"Expected argument `norm` to be 'linf', 'l2' or 'l1', but got {norm!r}.")


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, shape ``(N,)``, in a shape that multiplies ``like``, shape ``(N, ...)``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def norm_of(delta: Tensor, norm: Norm) -> Tensor:
    """Norm of each sample: shape ``(N, ...)`` -> ``(N,)``.

    Example:
        >>> delta = torch.tensor([[3.0, -4.0]])
        >>> [norm_of(delta, norm).item() for norm in ("linf", "l2", "l1")]
        [4.0, 5.0, 7.0]

    """
    check_norm(norm)
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
    return torch.linalg.vector_norm(delta.flatten(1), order, dim=1)


def project_linf(delta: Tensor, eps: float | Tensor) -> Tensor:
    """Nearest point of the l-infinity ball of radius ``eps``.

    Example:
        >>> project_linf(torch.tensor([[0.5, -2.0]]), 1.0)
        tensor([[ 0.5000, -1.0000]])

    """
    if isinstance(eps, Tensor):
        radius = per_sample(eps, delta)
        return torch.minimum(torch.maximum(delta, -radius), radius)
    return delta.clamp(-eps, eps)


def project_l2(delta: Tensor, eps: float | Tensor) -> Tensor:
    """Nearest point of the l2 ball of radius ``eps``.

    Example:
        >>> project_l2(torch.tensor([[3.0, 4.0]]), 1.0)
        tensor([[0.6000, 0.8000]])

    """
    norms = norm_of(delta, "l2")
    return delta * per_sample((eps / norms.clamp_min(1e-12)).clamp_max(1.0), delta)


def project_l1(delta: Tensor, eps: float | Tensor) -> Tensor:
    r"""Nearest point of the l1 ball of radius ``eps``.

    .. math:: p_i = \mathrm{sign}(v_i) \max(|v_i| - \theta, 0), \qquad
        \theta = \frac{1}{\rho} \Big( \sum_{j \le \rho} u_j - \epsilon \Big), \quad
        \rho = \max \Big\{ j : u_j > \frac{1}{j} \Big( \sum_{i \le j} u_i - \epsilon \Big) \Big\}

    with :math:`u` the magnitudes in descending order; the point itself where it lies in the ball.

    Paper: Efficient Projections onto the l1-Ball for Learning in High Dimensions (ICML 2008).

    Args:
        delta: Float32 or float64, shape ``(N, ...)``.
        eps: Radius, at least 0; one for all samples, or shape ``(N,)``.

    Returns:
        The projections, same shape.

    Example:
        >>> project_l1(torch.tensor([[3.0, 1.0]]), 2.0)
        tensor([[2., 0.]])

    """
    flat = delta.flatten(1)
    radius = torch.as_tensor(eps, dtype=flat.dtype, device=flat.device).expand(len(flat))
    magnitudes = flat.abs()
    descending = magnitudes.sort(dim=1, descending=True).values
    excess = descending.cumsum(dim=1) - radius[:, None]
    count = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    active = (descending * count > excess).sum(dim=1).clamp_min(1)
    theta = excess.gather(1, active[:, None] - 1) / active[:, None]
    inside = magnitudes.sum(dim=1) <= radius
    projected = flat.sign() * (magnitudes - theta).clamp_min(0.0)
    return torch.where(inside[:, None], flat, projected).view_as(delta)


def project_l1_box(inputs: Tensor, delta: Tensor, eps: float | Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    r"""Nearest point of the l1 ball of radius ``eps`` around ``inputs`` that keeps them in the box ``[low, high]``.

    .. math:: p_i = \mathrm{sign}(v_i) \min(\max(|v_i| - \lambda, 0), \gamma_i)

    with :math:`\gamma_i` the room that input :math:`i` has in the direction of :math:`v_i`, and :math:`\lambda \ge 0`
    the smallest for which :math:`\sum_i |p_i| \le \epsilon`. That sum is piecewise linear in :math:`\lambda`, with
    kinks at :math:`|v_i|` and :math:`|v_i| - \gamma_i`; they are sorted, and the piece that holds :math:`\epsilon` is
    interpolated.

    Paper: Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers (ICML 2021).

    Args:
        inputs: Inputs in the box, shape ``(N, ...)``.
        delta: What is added to them, same shape.
        eps: Radius, at least 0; one for all samples, or shape ``(N,)``.
        low: Smallest valid input.
        high: Largest valid input.

    Returns:
        The projections, same shape.

    Example:
        >>> project_l1_box(torch.tensor([[0.9, 0.5]]), torch.tensor([[0.4, 0.4]]), 0.3)
        tensor([[0.1000, 0.2000]])

    """
    flat = delta.flatten(1)
    radius = torch.as_tensor(eps, dtype=flat.dtype, device=flat.device).expand(len(flat))
    place = inputs.flatten(1).to(flat.dtype)
    magnitudes = flat.abs()
    room = torch.where(flat > 0, high - place, place - low).clamp_min(0.0)
    # beyond lambda = |v| an entry is zero, below |v| - gamma it is the room; in between it falls with slope one
    ends = torch.cat([magnitudes, (magnitudes - room).clamp_min(0.0)], dim=1)
    slopes = torch.cat([torch.ones_like(magnitudes), -torch.ones_like(magnitudes)], dim=1)
    kinks, order = ends.sort(dim=1, descending=True)
    rising = slopes.gather(1, order).cumsum(dim=1)  # how many entries fall just below each kink
    widths = kinks[:, :-1] - kinks[:, 1:]
    grown = torch.cat([torch.zeros_like(kinks[:, :1]), (widths * rising[:, :-1]).cumsum(dim=1)], dim=1)
    # the sum at lambda = kinks[j] is grown[j]; the last piece reaches down to lambda = 0
    place_of = (torch.searchsorted(grown, radius[:, None].contiguous(), right=True) - 1).clamp_min(0)
    below, slope = kinks.gather(1, place_of), rising.gather(1, place_of)
    left = (radius[:, None] - grown.gather(1, place_of)).clamp_min(0.0)
    threshold = torch.where(slope > 0, below - left / slope.clamp_min(1.0), below).clamp_min(0.0)
    inside = torch.minimum(magnitudes, room).sum(dim=1, keepdim=True) <= radius[:, None]
    threshold = torch.where(inside, torch.zeros_like(threshold), threshold)
    projected = flat.sign() * torch.minimum((magnitudes - threshold).clamp_min(0.0), room)
    return projected.view_as(delta)


def hyperplane_step(
    inputs: Tensor, weights: Tensor, gap: Tensor, norm: Norm, low: float = 0.0, high: float = 1.0
) -> Tensor:
    r"""The smallest step from ``inputs`` onto a hyperplane that stays in the box ``[low, high]``.

    .. math:: \min_d \lVert d \rVert_p \quad \text{s.t.} \quad \langle w, d \rangle = g, \;
        \mathrm{low} \le x + d \le \mathrm{high}

    or, where the box does not reach the hyperplane, the step to its nearest corner. With :math:`r_i` the room in the
    useful direction, the solution is :math:`|d_i| = \min(\lambda, r_i)` for linf and
    :math:`|d_i| = \min(\lambda |w_i|, r_i)` for l2, with the :math:`\lambda` for which the piecewise linear
    :math:`\sum_i |w_i d_i|` is :math:`|g|`; for l1 it is the whole room of the entries with the largest weights.

    Paper: Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack (ICML 2020).

    Args:
        inputs: Points in the box, shape ``(N, ...)``.
        weights: Normals :math:`w` of the hyperplanes, same shape.
        gap: What is to be gained, :math:`g`, shape ``(N,)``.
        norm: Norm of the step.
        low: Smallest valid input.
        high: Largest valid input.

    Returns:
        The steps, same shape.

    Example:
        >>> inputs, weights, gap = torch.tensor([[0.9, 0.5]]), torch.tensor([[1.0, 2.0]]), torch.tensor([0.6])
        >>> [hyperplane_step(inputs, weights, gap, norm).tolist() for norm in ("linf", "l1")]
        [[[0.10000002384185791, 0.25]], [[0.0, 0.30000001192092896]]]

    """
    check_norm(norm)
    place, slope = inputs.flatten(1), weights.flatten(1)
    # the step goes along `way`, in which every entry gains
    way = slope.sign() * gap.sign()[:, None]
    room = torch.where(way > 0, high - place, place - low).clamp_min(0.0)
    slope, gap = slope.abs(), gap.abs()[:, None]
    if norm == "l1":
        order = slope.argsort(dim=1, descending=True)
        gains = (slope * room).gather(1, order)
        left = gap - (gains.cumsum(dim=1) - gains)
        taken = torch.minimum(left / slope.gather(1, order).clamp_min(1e-12), room.gather(1, order)).clamp_min(0.0)
        length = torch.zeros_like(room).scatter_(1, order, taken)
    else:
        speed = slope if norm == "l2" else torch.ones_like(slope)
        gain, full = slope * speed, slope * room
        kinks = room / speed.clamp_min(1e-30)
        # what is gained is concave in the factor: Newton's steps from below never pass the solution, and end in it
        factor = gap / gain.sum(dim=1, keepdim=True).clamp_min(1e-30)
        for _ in range(gain.shape[1]):
            spent = kinks <= factor
            left = gap - full.masked_fill(~spent, 0.0).sum(dim=1, keepdim=True)
            rate = gain.masked_fill(spent, 0.0).sum(dim=1, keepdim=True)
            further = torch.where(rate > 0, left / rate.clamp_min(1e-30), torch.inf)
            # also where rounding would turn back
            if not bool((further > factor).any()):
                break
            factor = torch.maximum(factor, further)
        length = torch.minimum(torch.where(slope > 0, factor * speed, torch.zeros_like(speed)), room)
    return (way * length).view_as(inputs)


def project(delta: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    """Nearest point of the ball of a norm."""
    check_norm(norm)
    return {"linf": project_linf, "l2": project_l2, "l1": project_l1}[norm](delta, eps)


def linear_minimiser(gradient: Tensor, norm: Norm) -> Tensor:
    r"""The point of the unit ball of a norm at which :math:`\langle g, \cdot \rangle` is smallest.

    linf: :math:`-\mathrm{sign}(g)`; l2: :math:`-g / \lVert g \rVert_2`; l1: minus the sign of the largest entry.

    Args:
        gradient: Shape ``(N, ...)``.
        norm: The norm.

    Returns:
        Same shape; zero where the gradient is zero.

    Example:
        >>> linear_minimiser(torch.tensor([[3.0, -4.0]]), "l2")
        tensor([[-0.6000,  0.8000]])
        >>> linear_minimiser(torch.tensor([[3.0, -4.0]]), "l1")
        tensor([[-0.,  1.]])

    """
    check_norm(norm)
    if norm == "linf":
        return -gradient.sign()
    if norm == "l2":
        return -gradient / per_sample(norm_of(gradient, "l2").clamp_min(1e-12), gradient)
    flat = gradient.flatten(1)
    largest = flat.abs().argmax(dim=1, keepdim=True)
    only = torch.zeros_like(flat).scatter_(1, largest, 1.0)
    return (-flat.sign() * only).view_as(gradient)
