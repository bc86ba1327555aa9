"""Unlearning by going on with the retain set."""

from __future__ import annotations

from lightning_trust.callbacks.unlearning.unlearner import Unlearner


class FineTune(Unlearner):
    r"""Train on the retain set alone and let the network forget the rest.

    .. math:: \min_\theta \mathbb{E}_{(x, y) \in D_r} \, \ell(f(x; \theta), y)

    Paper: Model Sparsity Can Simplify Machine Unlearning (NeurIPS 2023), baseline FT: 10 epochs at learning rate 0.01.

    Args:
        name: Tells two callbacks of this class apart.

    Raises:
        MisconfigurationException: If the run's data module is no ``ForgetSplit``, or feeds something else, or another
            callback unlearns as well.

    Example:
        >>> FineTune().current_feed()
        'retain'

    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name=name)
