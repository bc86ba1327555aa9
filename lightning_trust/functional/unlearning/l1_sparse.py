"""The coefficient of sparsity-aware unlearning."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["linear_decay", "constant", "linear_growth"]


def l1_coefficient(
    epoch: int, epochs: int, alpha: float, schedule: Schedule = "linear_decay", no_l1_epochs: int = 0
) -> float:
    r"""Weight of the l1 term in one epoch of sparsity-aware unlearning.

    With :math:`E' = E - n_0`, for epochs :math:`e < E'`,

    * ``"linear_decay"``: :math:`\alpha_e = \alpha (1 - e / E')`,
    * ``"constant"``: :math:`\alpha_e = \alpha`,
    * ``"linear_growth"``: :math:`\alpha_e = \alpha\, e / E'`,

    and 0 afterwards. The last epoch is not 0 but :math:`\alpha / E` when :math:`n_0 = 0` and the weight decays. With
    :math:`n_0 = E` it stays :math:`\alpha`, as in the authors' code.

    Paper: Model Sparsity Can Simplify Machine Unlearning (NeurIPS 2023); the decaying schedule was found best.

    Args:
        epoch: Epoch e, from 0.
        epochs: Number of epochs E.
        alpha: Weight at its largest.
        schedule: How it changes.
        no_l1_epochs: Number of last epochs :math:`n_0` without the term.

    Example:
        >>> [l1_coefficient(epoch, 4, 1.0) for epoch in range(4)]
        [1.0, 0.75, 0.5, 0.25]

    """
    span = epochs - no_l1_epochs
    if span == 0:
        return alpha
    if epoch >= span:
        return 0.0
    if schedule == "constant":
        return alpha
    return alpha * (1.0 - epoch / span if schedule == "linear_decay" else epoch / span)
