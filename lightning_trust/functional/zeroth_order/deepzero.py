"""Zeroth-order GraSP: which layers bear pruning, from estimates of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


def zo_grasp_scores(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], moved: Mapping[str, Tensor], mu: float
) -> dict[str, Tensor]:
    r"""Scores of weights by what removing them does to the flow of the gradient.

    .. math:: s = -\theta \odot H \hat g, \qquad
        H \hat g \approx \frac{\hat g(\theta + \mu \hat g) - \hat g(\theta)}{\mu}

    Papers: Picking Winning Tickets Before Training by Preserving Gradient Flow (GraSP, ICLR 2020, arXiv:2002.07376);
    DeepZero (ICLR 2024, arXiv:2310.02025).

    Args:
        weights: :math:`\theta` by name.
        gradients: :math:`\hat g(\theta)` by name.
        moved: :math:`\hat g(\theta + \mu \hat g)` by name.
        mu: :math:`\mu`, positive.

    Returns:
        Scores by name, of the weights' shapes.

    Example:
        >>> weight, hessian = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> gradient = hessian @ weight
        >>> moved = hessian @ (weight + 0.5 * gradient)
        >>> zo_grasp_scores({"w": weight}, {"w": gradient}, {"w": moved}, 0.5)
        {'w': tensor([ -4., -64.])}

    """
    return {name: -weight * (moved[name] - gradients[name]) / mu for name, weight in weights.items()}


def layer_pruning_ratios(
    scores: Mapping[str, Tensor], sparsity: float, keep: Literal["abs", "signed"] = "abs"
) -> dict[str, float]:
    r"""Share of each layer's weights that is pruned where all weights are ranked together.

    .. math:: \mathrm{LPR}_l = \frac{\#\{i \in l : i \text{ is pruned}\}}{n_l}, \qquad
        \sum_l n_l \, \mathrm{LPR}_l = \mathrm{round}(p \, n)

    Args:
        scores: GraSP scores by name of the layer's weight.
        sparsity: Share :math:`p` of all weights that is pruned, in [0, 1).
        keep: ``"abs"`` prunes the scores nearest to zero, as the released code of DeepZero; ``"signed"`` the largest
            ones, whose removal raises the flow most, as the papers of both.

    Returns:
        Ratios by name, in [0, 1].

    Raises:
        ValueError: If ``sparsity`` lies outside, or ``keep`` is neither.

    Example:
        >>> scores = {"a": torch.tensor([0.1, -3.0]), "b": torch.tensor([2.0, 0.2])}
        >>> layer_pruning_ratios(scores, 0.5)
        {'a': 0.5, 'b': 0.5}
        >>> layer_pruning_ratios(scores, 0.5, keep="signed")
        {'a': 0.0, 'b': 1.0}

    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"Expected argument `sparsity` to be a share of zeros in [0, 1), but got {sparsity}.")
    if keep not in ("abs", "signed"):
        raise ValueError(f"Expected argument `keep` to be 'abs' or 'signed', but got {keep!r}.")
    every = torch.cat([score.flatten() for score in scores.values()])
    order = every.abs() if keep == "abs" else -every
    pruned = torch.zeros_like(every, dtype=torch.bool)
    pruned[order.argsort(stable=True)[: round(sparsity * len(every))]] = True
    parts = pruned.split([score.numel() for score in scores.values()])
    return {name: float(part.double().mean()) for name, part in zip(scores, parts, strict=True)}
