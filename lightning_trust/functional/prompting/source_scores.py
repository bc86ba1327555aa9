"""How much a target task has to do with each class, group or row of a source data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def label_mapping_evidence(model: Callable[[Tensor], Tensor], target_loader: Iterable[Any], num_source: int) -> Tensor:
    r"""What target images say of each source class: how often it is predicted, and the probability given to it.

    .. math:: s_k = |\{i : \arg\max_j f_j(x_i) = k\}|, \qquad m_k = \sum_i \mathrm{softmax}(f(x_i))_k

    Logits count as float32, so that half precision decides no ties but those that it makes. Evidence of parts of the
    data adds up.

    Args:
        model: Inputs -> logits ``(B, num_source)``; a module is left in the mode that it is in.
        target_loader: Batches: inputs, or tuples and lists that begin with them. They are moved to a module's device.
        num_source: Number of source classes :math:`K`.

    Returns:
        Float64, shape ``(2, K)``: counts :math:`s`, probabilities :math:`m`.

    Raises:
        ValueError: If logits are not of that width, or not finite.

    """
    device = _device(model)
    evidence = torch.zeros(2, num_source, dtype=torch.float64, device=device)
    for batch in target_loader:
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        logits = model(inputs.to(device))
        if logits.ndim != 2 or logits.shape[1] != num_source:
            raise ValueError(
                f"Expected argument `num_source` to be the width of the logits, {tuple(logits.shape)}, but got"
                f" {num_source}."
            )
        logits = check_finite(logits.float(), "logits of the surrogate")
        evidence[0] += torch.bincount(logits.argmax(dim=1), minlength=num_source)
        evidence[1] += logits.double().softmax(dim=1).sum(dim=0)
    return evidence


def label_mapping_scores(model: Callable[[Tensor], Tensor], target_loader: Iterable[Any], num_source: int) -> Tensor:
    r"""How often each source class is predicted for target images (LM); labels of the target are not used.

    From "Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer Learning" (NeurIPS 2023):

    .. math:: s_k = |\{i : \arg\max_j f_j(x_i) = k\}|

    Args:
        model: A classifier of the source: inputs -> logits ``(B, num_source)``. A module is to be in eval mode.
        target_loader: Batches: inputs, or tuples and lists that begin with them.
        num_source: Number of source classes.

    Returns:
        Scores, int64, shape ``(num_source,)``; their sum is the number of target images.

    Raises:
        ValueError: If there are no target images, or logits are not of that width or not finite.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.0, 2.0], [5.0, 4.0, 0.0]])
        >>> label_mapping_scores(torch.nn.Identity(), [logits], num_source=3)
        tensor([2, 0, 1])

    """
    scores = label_mapping_evidence(model, target_loader, num_source)[0].long()
    if not int(scores.sum()):
        raise ValueError("Expected argument `target_loader` to hold target images, but got none.")
    return scores


def group_sums(features: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Sums of the features of each group, and how many there are; those of parts of the data add up.

    Args:
        features: Shape ``(N, D)``.
        groups: Group of each row, int64 in ``[0, num_groups)``, shape ``(N,)``.
        num_groups: Number of groups ``G``.

    Returns:
        Float64 ``(G, D)`` and int64 ``(G,)``.

    Raises:
        ValueError: If shapes differ, a group is out of range, or a feature is not finite.

    """
    if features.ndim != 2 or groups.shape != features.shape[:1]:
        raise ValueError(
            "Expected features of shape (N, D) and groups of shape (N,), but got"
            f" {tuple(features.shape)} and {tuple(groups.shape)}."
        )
    if len(groups) and (int(groups.min()) < 0 or int(groups.max()) >= num_groups):
        raise ValueError(
            f"Expected groups to lie in [0, {num_groups}), but got {int(groups.min())} to {int(groups.max())}."
        )
    check_finite(features, "features of the source")
    sums = torch.zeros(num_groups, features.shape[1], dtype=torch.float64, device=features.device)
    return sums.index_add_(0, groups, features.double()), torch.bincount(groups, minlength=num_groups)


def group_means(features: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    r"""Mean of the features of each group, :math:`\mu_g`.

    Args:
        features: Shape ``(N, D)``.
        groups: Group of each row, int64 in ``[0, num_groups)``, shape ``(N,)``.
        num_groups: Number of groups ``G``.

    Returns:
        Float64, shape ``(G, D)``.

    Raises:
        ValueError: If a group has no rows, shapes differ, or a feature is not finite.

    Example:
        >>> group_means(torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0]]), torch.tensor([1, 1, 0]), 2).tolist()
        [[5.0, 5.0], [1.0, 1.0]]

    """
    sums, counts = group_sums(features, groups, num_groups)
    check_no_empty_group(counts)
    return sums / counts[:, None]


@torch.no_grad()
def feature_mapping_evidence(means: Tensor, target_feats: Tensor, chunk: int = 4096) -> Tensor:
    r"""What target features say of each source group: how often it is the nearest, and their distances to it.

    .. math::
        s_g = |\{i : \arg\min_h \|\phi_i - \mu_h\|_2 = g\}|, \qquad d_g = \sum_i \|\phi_i - \mu_g\|_2

    Evidence of parts of the data adds up.

    Args:
        means: Means :math:`\mu` of the groups, shape ``(G, D)``.
        target_feats: Features :math:`\phi` of the target, shape ``(M, D)``.
        chunk: How many rows are compared with all groups at a time; the result does not depend on it but in rounding.

    Returns:
        Float64, shape ``(2, G)``: counts :math:`s`, sums of distances :math:`d`.

    Raises:
        ValueError: If dimensions differ, a feature is not finite, or ``chunk`` is not positive.

    """
    if target_feats.ndim != 2 or target_feats.shape[1] != means.shape[1]:
        raise ValueError(
            f"Expected target features of shape (M, {means.shape[1]}), as those of the source, but got"
            f" {tuple(target_feats.shape)}."
        )
    if chunk < 1:
        raise ValueError(f"Expected argument `chunk` to be a positive integer, but got {chunk}.")
    check_finite(target_feats, "features of the target")
    evidence = torch.zeros(2, len(means), dtype=torch.float64, device=means.device)
    for rows in target_feats.split(chunk):
        # differences, not products: the latter lose the digits that decide between near groups far from the origin
        distances = torch.cdist(rows.double(), means.double(), compute_mode="donot_use_mm_for_euclid_dist")
        evidence[0] += torch.bincount(distances.argmin(dim=1), minlength=len(means))
        evidence[1] += distances.sum(dim=0)
    return evidence


def feature_mapping_scores(
    source_feats: Tensor, source_groups: Tensor, target_feats: Tensor, num_groups: int, chunk: int = 4096
) -> Tensor:
    r"""How often the mean of each source group is the nearest one to target features (FM); no labels are needed.

    From "Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer Learning" (NeurIPS 2023):

    .. math:: s_g = |\{i : \arg\min_h \|\phi(x_i) - \mu_h\|_2 = g\}|

    Args:
        source_feats: Features of the source, shape ``(N, D)``.
        source_groups: Group of each of its rows (a class or a cluster), int64 in ``[0, num_groups)``, shape ``(N,)``.
        target_feats: Features of the target, shape ``(M, D)``.
        num_groups: Number of groups.
        chunk: How many target rows are compared with all groups at a time.

    Returns:
        Scores, int64, shape ``(num_groups,)``; their sum is ``M``.

    Raises:
        ValueError: If there are no target features, a group has no rows, dimensions differ, or a feature is not finite.

    Example:
        >>> source = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0]])
        >>> target = torch.tensor([[9.0, 1.0], [8.0, 0.0], [1.0, 1.0]])
        >>> feature_mapping_scores(source, torch.tensor([0, 0, 1]), target, num_groups=2)
        tensor([1, 2])

    """
    if not len(target_feats):
        raise ValueError("Expected argument `target_feats` to hold features of target images, but got none.")
    means = group_means(source_feats, source_groups, num_groups)
    return feature_mapping_evidence(means, target_feats, chunk)[0].long()


def rank_groups(scores: Tensor, ties: Tensor) -> Tensor:
    """Groups from the highest score to the lowest; of equal ones the higher ``ties`` is first, then the lower number.

    Args:
        scores: Shape ``(G,)``.
        ties: What decides between equal scores, shape ``(G,)``.

    Returns:
        Numbers of the groups, int64, shape ``(G,)``.

    Example:
        >>> rank_groups(torch.tensor([0, 5, 0, 0]), torch.tensor([0.1, 0.0, 0.3, 0.1]))
        tensor([1, 2, 0, 3])

    """
    order = ties.argsort(descending=True, stable=True)
    return order[scores[order].argsort(descending=True, stable=True)]


def linear_grad_norms(features: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    r"""Norm of each row's gradient of the cross-entropy with respect to a last linear layer, weight and bias.

    .. math:: \|\nabla_{W, b} \ell(W \phi_i + b, y_i)\|_2 = \|p_i - e_{y_i}\|_2 \sqrt{\|\phi_i\|_2^2 + 1}

    Args:
        features: What goes into the layer, shape ``(N, D)``.
        logits: What comes out, shape ``(N, K)``.
        targets: Labels, int64, shape ``(N,)``.

    Returns:
        Norms, shape ``(N,)``.

    Example:
        >>> linear_grad_norms(torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2), torch.tensor([0]))
        tensor([1.2247])

    """
    errors = logits.softmax(dim=1) - nn.functional.one_hot(targets, logits.shape[1])
    return errors.norm(dim=1) * (features.square().sum(dim=1) + 1.0).sqrt()


def grad_norm_scores(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    r"""Norm of each row's gradient of the cross-entropy with respect to all parameters (GraNd).

    From "Deep Learning on a Data Diet: Finding Important Examples Early in Training" (NeurIPS 2021, arXiv:2107.07075):

    .. math:: s_i = \|\nabla_\theta \ell(f_\theta(x_i), y_i)\|_2

    There, the mean over networks of several seeds, early in training.

    Args:
        model: A classifier whose outputs for a row do not depend on other rows: BatchNorm in eval mode.
        inputs: Shape ``(B, ...)``.
        targets: Labels, int64, shape ``(B,)``.

    Returns:
        Norms, shape ``(B,)``.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        >>> grad_norm_scores(layer, torch.tensor([[1.0, 1.0]]), torch.tensor([0]))
        tensor([1.2247])

    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}

    def loss(weights: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**weights, **buffers}, (row[None],))
        return nn.functional.cross_entropy(logits, target[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    squares = [gradient.flatten(1).square().sum(dim=1) for gradient in gradients.values()]
    return torch.stack(squares).sum(dim=0).sqrt()


def moderate_rows(features: Tensor, labels: Tensor, keep_ratio: float) -> Tensor:
    r"""Rows whose distance to the median of their class is neither small nor large (Moderate).

    From "Moderate Coreset: A Universal Method of Data Selection for Real-world Data-efficient Deep Learning" (ICLR
    2023): of each class those whose :math:`\|\phi_i - \mathrm{median}_{y_i}\|_2` lies between its quantiles
    :math:`\frac12 - \frac r2` and :math:`\frac12 + \frac r2`, at least one.

    Args:
        features: Shape ``(N, D)``.
        labels: Class of each row, int64, shape ``(N,)``.
        keep_ratio: Share :math:`r` of each class, in (0, 1].

    Returns:
        Numbers of the rows, ascending, int64.

    Example:
        >>> moderate_rows(torch.tensor([[0.0], [1.0], [2.0], [4.0], [20.0]]), torch.zeros(5).long(), 0.6)
        tensor([0, 1, 3])

    """
    kept = []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        own = features[rows]
        in_order = own.sort(dim=0).values
        middle = (in_order[(len(rows) - 1) // 2] + in_order[len(rows) // 2]) / 2
        order = (own - middle).norm(dim=1).argsort(stable=True)
        count = max(1, round(keep_ratio * len(rows)))
        start = (len(rows) - count) // 2
        kept.append(rows[order[start : start + count]])
    return torch.cat(kept).sort().values


def check_no_empty_group(counts: Tensor) -> None:
    """Raise ValueError where a group has no rows, because its mean is undefined."""
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        names = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        raise ValueError(
            f"Expected every group of the source to have rows, for a mean of none is undefined, but {len(empty)} of"
            f" {len(counts)} have none: {names}."
        )


def check_finite(values: Tensor, what: str) -> Tensor:
    """Raise ValueError where a value is NaN or infinite."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"Expected {what} to be finite, but got NaN or infinite values.")
    return values


def _device(model: Any) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
