"""Which source classes of a classifier stand for which classes of another task."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Solver = Literal["greedy", "hungarian"]


def count_predictions(predictions: Tensor, targets: Tensor, num_source: int, num_target: int) -> Tensor:
    r"""How often each source class is predicted for each target class.

    .. math:: C_{st} = |\{i : \hat s_i = s,\ y_i = t\}|

    Args:
        predictions: Source classes, int64, shape ``(N,)``, in ``[0, num_source)``.
        targets: Target classes, int64, shape ``(N,)``, in ``[0, num_target)``.
        num_source: Number of source classes.
        num_target: Number of target classes.

    Returns:
        Counts, int64, shape ``(num_source, num_target)``. Counts of parts of the data add up.

    Raises:
        ValueError: If a class is out of range.

    Example:
        >>> count_predictions(torch.tensor([2, 2, 0]), torch.tensor([1, 1, 0]), num_source=3, num_target=2)
        tensor([[1, 0],
                [0, 0],
                [0, 2]])

    """
    for name, classes, count in (("predictions", predictions, num_source), ("targets", targets, num_target)):
        if classes.numel() and not (int(classes.min()) >= 0 and int(classes.max()) < count):
            raise ValueError(
                f"Expected argument `{name}` to hold classes in [0, {count}), but got {int(classes.min())} to"
                f" {int(classes.max())}."
            )
    flat = torch.bincount(predictions * num_target + targets, minlength=num_source * num_target)
    return flat.view(num_source, num_target)


def frequency_label_mapping(counts: Tensor, sources_per_target: int = 1, solver: Solver = "greedy") -> Tensor:
    r"""Give each target class the source classes that are predicted most often for it; each is given once.

    From "Understanding and Improving Visual Prompting: A Label-Mapping Perspective" (CVPR 2023). The greedy solver
    takes the largest count left, gives its source class to its target class, and goes on without that source class, and
    without target classes that have all of theirs. Of equal counts it takes the lowest source class, then the lowest
    target class, so that a class that is never predicted gets the lowest source class that is left. The Hungarian
    solver maximises the sum of counts.

    Args:
        counts: Counts :math:`C`, not negative, shape ``(K_s, K_t)``; see :func:`count_predictions`.
        sources_per_target: Source classes :math:`m` of each target class.
        solver: ``"greedy"`` or ``"hungarian"``.

    Returns:
        Source classes of each target class, int64, shape ``(K_t, m)``, in the order in which they were given.

    Raises:
        ValueError: If counts are no such matrix, or there are fewer than :math:`m K_t` source classes.

    Example:
        >>> frequency_label_mapping(torch.tensor([[5, 4], [6, 0], [0, 3]])).flatten()
        tensor([1, 0])

    """
    if counts.ndim != 2 or not counts.numel():
        raise ValueError(
            f"Expected argument `counts` to have shape (num_source, num_target), but got {tuple(counts.shape)}."
        )
    if bool((counts < 0).any()):
        raise ValueError(f"Expected argument `counts` not to be negative, but got {float(counts.min()):g}.")
    if solver not in ("greedy", "hungarian"):
        raise ValueError(f"Expected argument `solver` to be 'greedy' or 'hungarian', but got {solver!r}.")
    num_source, num_target = counts.shape
    check_enough_sources(num_source, num_target, sources_per_target)
    if solver == "hungarian":
        return _assigned(counts, sources_per_target)
    given: list[list[int]] = [[] for _ in range(num_target)]
    free = [True] * num_source
    left = num_target * sources_per_target
    # entries lie by source class, then target class, and a stable sort keeps that order among equals
    order = counts.cpu().flatten().argsort(descending=True, stable=True).tolist()
    for entry in order:
        source, target = divmod(entry, num_target)
        if free[source] and len(given[target]) < sources_per_target:
            free[source] = False
            given[target].append(source)
            left -= 1
            if not left:
                break
    return torch.tensor(given, dtype=torch.int64, device=counts.device)


def semantic_label_mapping(similarity: Tensor, sources_per_target: int = 1) -> Tensor:
    """Give each target class in turn the source class whose name is most like its own, and is left; several rounds.

    From "AutoVP: An Automated Visual Prompting Framework and Benchmark" (ICLR 2024).

    Args:
        similarity: Similarities of names, shape ``(K_t, K_s)``, such as cosines of their embeddings.
        sources_per_target: Source classes of each target class, one a round.

    Returns:
        Source classes of each target class, int64, shape ``(K_t, m)``.

    Raises:
        ValueError: If there are too few source classes.

    Example:
        >>> semantic_label_mapping(torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.7, 0.2, 0.3, 0.6]]), 2)
        tensor([[0, 1],
                [3, 2]])

    """
    num_target, num_source = similarity.shape
    check_enough_sources(num_source, num_target, sources_per_target)
    left = similarity.detach().clone().float()
    given = torch.empty(num_target, sources_per_target, dtype=torch.int64, device=similarity.device)
    for turn in range(sources_per_target):
        for target in range(num_target):
            source = left[target].argmax()
            given[target, turn] = source
            left[:, source] = -torch.inf
    return given


def mapping_precision(indices: Tensor, recounted: Tensor) -> float:
    """Share of target classes whose source classes a mapping and one counted anew agree on.

    Args:
        indices: Source classes of each target class, shape ``(K_t, m)``.
        recounted: The same from counts of the network as it is now.

    Example:
        >>> mapping_precision(torch.tensor([[0], [1], [2], [3]]), torch.tensor([[0], [2], [1], [3]]))
        0.5

    """
    same = (indices.sort(dim=1).values == recounted.sort(dim=1).values).all(dim=1)
    return float(same.double().mean())


def check_enough_sources(num_source: int, num_target: int, sources_per_target: int) -> None:
    """Refuse more target classes than there are source classes for.

    Raises:
        ValueError: With all three numbers.

    """
    if sources_per_target < 1:
        raise ValueError(f"Expected argument `sources_per_target` to be at least 1, but got {sources_per_target}.")
    if num_source < num_target * sources_per_target:
        raise ValueError(
            f"Expected at least sources_per_target * num_target = {sources_per_target} * {num_target} source classes,"
            f" because each is given once, but got num_source={num_source}."
        )


def _assigned(counts: Tensor, sources_per_target: int) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    num_target = counts.shape[1]
    columns = counts.double().cpu().repeat_interleave(sources_per_target, dim=1)
    sources, places = linear_sum_assignment(columns.numpy(), maximize=True)
    given = torch.empty(num_target * sources_per_target, dtype=torch.int64)
    given[torch.as_tensor(places)] = torch.as_tensor(sources)
    return given.view(num_target, sources_per_target).to(counts.device)
