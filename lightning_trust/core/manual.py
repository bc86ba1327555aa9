"""Several optimizers in one module: clipping, accumulation, schedulers and a global step that counts once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor


class ManualSteps:
    """What Lightning leaves to a module with ``automatic_optimization = False``, once for all such modules.

    The Trainer refuses to clip and to accumulate under manual optimisation, steps no scheduler, and counts
    ``global_step`` once for every optimizer, which stretches ``max_steps``, ``every_n_train_steps`` and loggers. Here
    all four behave as under automatic optimisation: the global step moves once an accumulation window, with the step of
    the first optimizer.

    Args:
        gradient_clip_val: Gradients are clipped to this norm or value; not clipped if None.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        accumulate_grad_batches: Number of batches a window.

    Raises:
        ValueError: If a number is not positive, or the algorithm is another word.

    Example:
        A module keeps one as ``self.steps`` and calls it in its hooks::

            def training_step(self, batch, batch_idx):
                self.steps.minimise(self, 0, lambda: self.critic_loss(batch))
                self.steps.minimise(self, 1, lambda: self.generator_loss(batch))

            def on_train_epoch_end(self):
                self.steps.end_epoch(self)

        >>> ManualSteps(gradient_clip_val=1.0).accumulate_grad_batches
        1

    """

    def __init__(
        self,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: int = 1,
    ) -> None:
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise ValueError(f"Expected argument `gradient_clip_val` to be positive, but got {gradient_clip_val}.")
        if gradient_clip_algorithm not in ("norm", "value"):
            raise ValueError(
                f"Expected argument `gradient_clip_algorithm` to be 'norm' or 'value', but got"
                f" {gradient_clip_algorithm!r}."
            )
        if accumulate_grad_batches < 1:
            raise ValueError(
                f"Expected argument `accumulate_grad_batches` to be at least 1, but got {accumulate_grad_batches}."
            )
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.accumulate_grad_batches = accumulate_grad_batches

    def minimise(self, module: Any, index: int, loss: Callable[[], Tensor]) -> Tensor:
        """Take the gradient of a loss for one optimizer's parameters, and its step where the window ends.

        Args:
            module: The LightningModule, inside its ``training_step``.
            index: Which of its optimizers.
            loss: Computes the loss; only the parameters of that optimizer take gradients meanwhile.

        Returns:
            The loss, without a graph.

        Raises:
            MisconfigurationException: If the module optimises automatically.

        """
        if module.automatic_optimization:
            raise MisconfigurationException(
                f"ManualSteps steps the optimizers itself, but {type(module).__name__} has automatic_optimization=True."
                " Set `self.automatic_optimization = False` in its `__init__`."
            )
        trainer = module.trainer
        optimizers = module.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        ends = (trainer.fit_loop.batch_idx + 1) % self.accumulate_grad_batches == 0 or trainer.is_last_batch
        with optimizer.toggle_model(sync_grad=ends):
            value = loss()
            module.manual_backward(value / self.accumulate_grad_batches)
        if ends:
            if self.gradient_clip_val is not None:
                module.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)
            if index > 0:
                # Lightning counts every wrapped step; a window counts with the first optimizer
                optimizer._on_before_step = optimizer._on_after_step = _count_nothing
            optimizer.step()
            optimizer.zero_grad()
            self._step_schedulers(module, optimizer.optimizer, "step")
        return value.detach()

    def end_epoch(self, module: Any) -> None:
        """Step the schedulers that count epochs; call it in ``on_train_epoch_end``."""
        self._step_schedulers(module, None, "epoch")

    def _step_schedulers(self, module: Any, optimizer: Any, interval: str) -> None:
        trainer = module.trainer
        for config in trainer.lr_scheduler_configs:
            ours = optimizer is None or config.scheduler.optimizer is optimizer
            count = trainer.global_step if interval == "step" else trainer.current_epoch + 1
            if not ours or config.interval != interval or count % config.frequency:
                continue
            metric = trainer.callback_metrics.get(config.monitor) if config.reduce_on_plateau else None
            module.lr_scheduler_step(config.scheduler, metric)


def _count_nothing() -> None:
    return None
