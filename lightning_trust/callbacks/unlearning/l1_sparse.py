"""Unlearning by going on with the retain set under a decaying l1 term."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_trust.callbacks.unlearning.unlearner import Unlearner
from lightning_trust.core.step import Attachment, Claim, GradientPhase
from lightning_trust.functional.unlearning.l1_sparse import Schedule, l1_coefficient


class L1Sparse(Unlearner):
    r"""Sparsity-aware unlearning: fine-tuning on the retain set with a decaying l1 penalty.

    .. math::
        \min_\theta \mathbb{E}_{(x, y) \in D_r} \, \ell(f(x; \theta), y) + \alpha_e \lVert \theta \rVert_1

    over all parameters, biases and normalisation included, with :math:`\alpha_e` by
    :func:`~lightning_trust.functional.unlearning.l1_coefficient`. Its gradient
    :math:`\alpha_e \, \mathrm{sign}(\theta)` is added once an optimizer step; the loss that the host logs is its own.

    Paper: Model Sparsity Can Simplify Machine Unlearning (NeurIPS 2023): 10 epochs at learning rate 0.01.

    Args:
        alpha: Weight of the penalty, at least 0; 5e-4 suits the width of a ResNet-18, the paper's code has no default.
            Search 1e-6 to 1e-3.
        schedule: How it changes over the epochs; the paper found decay best.
        no_l1_epochs: Number of last epochs without the penalty.
        name: Tells two callbacks of this class apart.

    Raises:
        ValueError: If ``alpha`` or ``no_l1_epochs`` is negative, the schedule is another word (at once), or
            ``no_l1_epochs`` exceeds the Trainer's epochs (before training).
        MisconfigurationException: If the schedule needs the number of epochs and the Trainer has no ``max_epochs``.

    Example:
        >>> L1Sparse(alpha=1e-3).alpha
        0.001

    """

    claims: ClassVar[tuple[Claim, ...]] = (*Unlearner.claims, "gradient_edit")

    def __init__(
        self,
        alpha: float = 5e-4,
        schedule: Schedule = "linear_decay",
        no_l1_epochs: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if not alpha >= 0.0:
            raise ValueError(f"Expected argument `alpha` to be at least 0, but got {alpha}.")
        if no_l1_epochs < 0:
            raise ValueError(f"Expected argument `no_l1_epochs` to be at least 0, but got {no_l1_epochs}.")
        if schedule not in ("linear_decay", "constant", "linear_growth"):
            raise ValueError(
                "Expected argument `schedule` to be 'linear_decay', 'constant' or 'linear_growth',"
                f" but got {schedule!r}."
            )
        self.alpha = alpha
        self.schedule = schedule
        self.no_l1_epochs = no_l1_epochs

    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Register the gradient of the penalty."""
        super().attach(trainer, host, attachment)
        epochs = trainer.fit_loop.max_epochs
        if self.schedule != "constant" or self.no_l1_epochs:
            if epochs is None or epochs < 0:
                raise MisconfigurationException(
                    f"L1Sparse(schedule={self.schedule!r}, no_l1_epochs={self.no_l1_epochs}) changes with the epochs,"
                    f" but the Trainer has max_epochs={epochs}. Set `max_epochs`, or take schedule='constant' without"
                    " `no_l1_epochs`."
                )
            if self.no_l1_epochs > epochs:
                raise ValueError(
                    f"Expected argument `no_l1_epochs` of L1Sparse to be at most max_epochs ({epochs}),"
                    f" but got {self.no_l1_epochs}."
                )
        attachment.edit_gradients(self, GradientPhase.ADD, self._add)

    def coefficient(self, epoch: int, epochs: int) -> float:
        """Weight of the penalty in one epoch.

        Args:
            epoch: The epoch, from 0.
            epochs: Number of epochs; -1 where the Trainer sets none.

        """
        if epochs < 0:
            # only a constant schedule comes here
            return self.alpha
        return l1_coefficient(epoch, epochs, self.alpha, self.schedule, self.no_l1_epochs)

    @torch.no_grad()
    def _add(self, optimizer: Optimizer) -> None:
        if self.attachment is None:
            return
        trainer = self.attachment.trainer
        epochs = trainer.fit_loop.max_epochs
        coefficient = self.coefficient(trainer.current_epoch, -1 if epochs is None else epochs)
        if coefficient == 0.0:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.sign(), alpha=coefficient)
