"""How a learning rate goes over the steps of a run."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from lightning_trust.core.schedules import Schedule

LearningRates = Schedule | Literal["cosine", "cyclic", "constant"]


def check_schedule(schedule: Any) -> None:
    """Refuse what is no schedule."""
    if not isinstance(schedule, Schedule) and schedule not in ("cosine", "cyclic", "constant"):
        raise ValueError(
            f"Expected argument `schedule` to be 'cosine', 'cyclic', 'constant' or a Schedule, but got {schedule!r}."
        )


def scheduled(optimizer: Optimizer, schedule: LearningRates, host: Any) -> OptimizerLRScheduler:
    r"""An optimizer and, unless it is constant, its learning rate per step, as ``configure_optimizers`` returns them.

    Args:
        optimizer: The optimizer.
        schedule: With :math:`T` steps in the run, step :math:`t = 0, \dots, T - 1` has :math:`\eta_t = \frac{\eta_0}{2}
            (1 + \cos(\pi t / T))` under ``"cosine"`` and :math:`\eta_t = \eta_0 (1 - |2 t / T - 1|)` under
            ``"cyclic"``; a schedule of core.schedules multiplies the rate by its value at the epochs gone by.
        host: The LightningModule of the run, which has its Trainer.

    Raises:
        MisconfigurationException: If the schedule asks for a number of steps that the run does not have.

    """
    if schedule == "constant":
        return optimizer
    trainer = host.trainer
    steps = trainer.estimated_stepping_batches
    if isinstance(schedule, Schedule):
        own = schedule
        # the line above has set up the training data
        batches = trainer.num_training_batches
        if not math.isfinite(batches):
            raise MisconfigurationException(
                f"schedule={own} needs to know the number of steps in an epoch, but the training data have no length."
                " Pass `limit_train_batches`, or take schedule='constant'."
            )
        epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
        scheduler: LRScheduler = LambdaLR(optimizer, lambda step: own.value_at(step / epoch))
    elif not math.isfinite(steps):
        raise MisconfigurationException(
            f"schedule='{schedule}' needs to know the number of steps, but the Trainer has neither `max_epochs` nor"
            " `max_steps`. Give one of them or take schedule='constant'."
        )
    elif schedule == "cyclic":
        scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1.0 - abs(2.0 * step / steps - 1.0)))
    else:
        scheduler = CosineAnnealingLR(optimizer, T_max=max(1, int(steps)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
