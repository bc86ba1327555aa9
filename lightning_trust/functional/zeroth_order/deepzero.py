"""GraSP: which weights and layers bear pruning, from the gradient or from estimates of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


def grasp_scores(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Scores of weights by what removing them does to the flow of the gradient, by autograd.

    .. math:: s = -\theta \odot H g, \qquad g = \nabla l(\theta), \quad H g = \nabla (g^\top \mathrm{stop}(g))

    over the weights that are given. Two backward passes; :func:`zo_grasp_scores` needs none.

    Paper: Picking Winning Tickets Before Training by Preserving Gradient Flow (GraSP, ICLR 2020, arXiv:2002.07376).

    Args:
        loss: :math:`l(\theta)`, a scalar with its graph, which is freed.
        weights: :math:`\theta` by name, leaves of that graph or not in it.

    Returns:
        Scores by name, of the weights' shapes; 0 where the loss does not depend on a weight.

    Raises:
        ValueError: If ``loss`` is no scalar, or has no graph.

    Example:
        >>> weight, hessian = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> grasp_scores(weight @ hessian @ weight / 2, {"w": weight})
        {'w': tensor([ -4., -64.])}

    """
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"Expected argument `loss` to be a scalar with a graph, but got shape {tuple(loss.shape)},"
            f" requires_grad={loss.requires_grad}."
        )
    own = list(weights.values())
    gradients = torch.autograd.grad(loss, own, create_graph=True, allow_unused=True, materialize_grads=True)
    flow = sum((each * each.detach()).sum() for each in gradients)
    if isinstance(flow, Tensor) and flow.requires_grad:
        products = torch.autograd.grad(flow, own, allow_unused=True, materialize_grads=True)
    else:
        # a linear loss
        products = tuple(torch.zeros_like(weight) for weight in own)
    return {name: -weight.detach() * product for (name, weight), product in zip(weights.items(), products, strict=True)}


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


def grasp_masks(
    scores: Mapping[str, Tensor], sparsity: float, keep: Literal["abs", "signed"] = "abs"
) -> dict[str, Tensor]:
    """Which weights are kept where all of them are ranked together.

    Args:
        scores: GraSP scores by name of the weight.
        sparsity: Share of all weights that is pruned, in [0, 1); ``round(sparsity * n)`` of them go.
        keep: ``"abs"`` prunes the scores nearest to zero, as the released code of DeepZero; ``"signed"`` the largest
            ones, whose removal raises the flow most, as the papers of both.

    Returns:
        Masks by name, of the scores' shapes: True where a weight is kept.

    Raises:
        ValueError: If ``sparsity`` lies outside, or ``keep`` is neither.

    Example:
        >>> grasp_masks({"a": torch.tensor([0.1, -3.0]), "b": torch.tensor([2.0, 0.2])}, 0.5)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}

    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"Expected argument `sparsity` to be a share of zeros in [0, 1), but got {sparsity}.")
    if keep not in ("abs", "signed"):
        raise ValueError(f"Expected argument `keep` to be 'abs' or 'signed', but got {keep!r}.")
    every = torch.cat([score.flatten() for score in scores.values()])
    order = every.abs() if keep == "abs" else -every
    kept = torch.ones_like(every, dtype=torch.bool)
    kept[order.argsort(stable=True)[: round(sparsity * len(every))]] = False
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


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
    kept = grasp_masks(scores, sparsity, keep)
    return {name: float((~mask).double().mean()) for name, mask in kept.items()}
