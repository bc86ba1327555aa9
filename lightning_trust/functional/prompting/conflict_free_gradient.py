"""A gradient for two players without the part in which they work for each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def conflict_free_gradient(
    utility: Sequence[Tensor], adversary: Sequence[Tensor], lmbda: float, project: bool = True
) -> list[Tensor]:
    r"""Gradient of a player that lowers its own loss and, never by chance, that of an adversary.

    .. math:: g = g_u - (g_u^\top u) \, u - \lambda g_a, \qquad u = g_a / \lVert g_a \rVert_2

    for every tensor by itself: what of the descent along :math:`g_u` would help the adversary (or hinder it) is taken
    out, then the adversary's loss is raised. With :math:`g_a = 0` there is no direction to avoid, and :math:`g = g_u`.

    The projection is not linear: average both gradients over micro-batches and ranks first.

    Papers: Mitigating Unwanted Biases with Adversarial Learning (AIES 2018, arXiv:1801.07593); Fairness Reprogramming
    (NeurIPS 2022).

    Args:
        utility: Gradients :math:`g_u` of the player's own loss.
        adversary: Gradients :math:`g_a` of the adversary's loss with respect to the same tensors.
        lmbda: Weight :math:`\lambda` of the adversary's loss, at least 0.
        project: Whether to take the component along :math:`g_a` out.

    Returns:
        New tensors of the same shapes.

    Raises:
        ValueError: If ``lmbda`` is negative, or numbers or shapes of the tensors differ.

    Example:
        >>> utility, adversary = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])
        >>> conflict_free_gradient([utility], [adversary], lmbda=0.5)
        [tensor([-1.,  1.])]
        >>> conflict_free_gradient([utility], [adversary], lmbda=0.5, project=False)
        [tensor([2., 1.])]
        >>> conflict_free_gradient([utility], [0.0 * adversary], lmbda=0.5)
        [tensor([3., 1.])]

    """
    if not lmbda >= 0.0:
        raise ValueError(f"Expected argument `lmbda` to be at least 0, but got {lmbda}.")
    shapes = [[tuple(gradient.shape) for gradient in gradients] for gradients in (utility, adversary)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Expected arguments `utility` and `adversary` to hold tensors of the same shapes, but got {shapes[0]} and"
            f" {shapes[1]}."
        )
    return [
        (_without_component(own, other) if project else own) - lmbda * other
        for own, other in zip(utility, adversary, strict=True)
    ]


def _without_component(gradient: Tensor, direction: Tensor) -> Tensor:
    if not direction.numel():
        return gradient
    # divided by the largest entry first: squares of small numbers are nothing in float32
    largest = direction.abs().amax()
    scaled = direction / torch.where(largest > 0.0, largest, torch.ones_like(largest))
    norm = torch.linalg.vector_norm(scaled)
    unit = scaled / torch.where(norm > 0.0, norm, torch.ones_like(norm))
    return gradient - (gradient * unit).sum() * unit
