"""Random labels for the rows to be forgotten."""

from __future__ import annotations

import torch
from torch import Tensor


def random_labels(targets: Tensor, draws: Tensor, num_classes: int, exclude_true_label: bool = False) -> Tensor:
    r"""Random labels from integer draws.

    :math:`y' = u \bmod K`, or without the true label :math:`y' = (y + 1 + u \bmod (K - 1)) \bmod K`.

    Paper: SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification and
    Generation (ICLR 2024); the paper says :math:`y' \ne y`, its code draws over all classes.

    Args:
        targets: True labels in ``[0, K)``, shape ``(N,)``, an integer type.
        draws: Non-negative random int64, shape ``(N,)``, uniform over a range much larger than K.
        num_classes: K, at least 2.
        exclude_true_label: Whether the true label is never drawn.

    Returns:
        Labels of the shape and type of ``targets``.

    Raises:
        ValueError: If ``num_classes`` is below 2, or the targets are no integers or not one a draw.

    Example:
        >>> random_labels(torch.tensor([0, 2]), torch.tensor([4, 4]), num_classes=3).tolist()
        [1, 1]
        >>> random_labels(torch.tensor([0, 2]), torch.tensor([4, 4]), 3, exclude_true_label=True).tolist()
        [1, 0]

    """
    if num_classes < 2:
        raise ValueError(f"Expected argument `num_classes` to be at least 2, but got {num_classes}.")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"Expected argument `targets` to be integer class labels, but got {targets.dtype}.")
    if targets.shape != draws.shape:
        raise ValueError(
            f"Expected argument `targets` to hold one label a row, of the shape {tuple(draws.shape)} of `draws`,"
            f" but got {tuple(targets.shape)}."
        )
    # the draws are int64, so that the sum with targets of a small type does not overflow
    drawn = (draws % (num_classes - 1) + targets + 1) % num_classes if exclude_true_label else draws % num_classes
    return drawn.to(targets.dtype)
