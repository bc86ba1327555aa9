"""Reuse of a frozen network by learning its input and what its outputs mean."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from lightning_trust.core.learning_rates import LearningRates
from lightning_trust.core.wrapping import SurroundingCallback
from lightning_trust.nn.prompting.label_mapping import check_fitted
from lightning_trust.nn.prompting.visual_prompt import VisualPrompt


class VisualPrompting(SurroundingCallback):
    r"""Train a prompt for a frozen network, in an unchanged run of an unchanged host.

    "Understanding and Improving Visual Prompting: A Label-Mapping Perspective" (CVPR 2023). The host's network
    :math:`f` computes :math:`\pi(f(p(x)))` wherever the host calls it, in training, validation, test and prediction;
    the host's loss and metrics are its own and see the outputs of the task. All that the host holds is frozen and in
    eval mode, BatchNorm statistics included; only the prompt (and a mapping with weights) is optimised.

    A checkpoint holds the host under its own keys and the prompt as this callback's state. For use without the host
    take :meth:`surrounded`, or :func:`lightning_trust.nn.save_prompt`.

    Args:
        prompt: Inputs to inputs of the network: :class:`~lightning_trust.nn.PadPrompt`,
            :class:`~lightning_trust.nn.WatermarkPrompt`, or any module.
        mapping: The network's outputs to those of the task: :class:`~lightning_trust.nn.LabelMapping`, or any module;
            None leaves them as they are. One that is counted needs
            :class:`~lightning_trust.callbacks.IterativeLabelMapping` as well.
        network: Name of the host's network; found by itself if None.
        optimizer: Called with what is trained, gives the optimizer; Adam with learning rate 0.01 by default, the
            paper's for classifiers. None takes the host's optimizers and schedules.
        schedule: Learning rate of ``optimizer`` over the run: ``"cosine"``, ``"cyclic"``, ``"constant"``, or a schedule
            of core.schedules, a factor at the epochs gone by; the paper divides by ten after 0.5 and 0.72 of the
            epochs: ``Steps([1.0, 0.1, 0.01], [100, 144])`` for 200.
        mapping_lr: Learning rate of what is trained beside the pattern, such as a scale and the weights of a mapping;
            that of ``optimizer`` if None.
        name: Tells two callbacks of one class apart.

    Raises:
        MisconfigurationException: If nothing is to be trained, the host's training step does not call the network, or
            a mapping is to be counted and nobody counts.
        ValueError: If inputs or outputs have other shapes than prompt or mapping expect.

    Example:
        >>> from lightning_trust.nn import LabelMapping, PadPrompt
        >>> prompting = VisualPrompting(PadPrompt(image_size=32, out_size=224), LabelMapping(1000, 100))
        >>> sum(parameter.numel() for parameter in prompting.part.parameters())
        150528

    """

    def __init__(
        self,
        prompt: nn.Module,
        mapping: nn.Module | None = None,
        network: str | None = None,
        optimizer: OptimizerCallable | None = lambda params: torch.optim.Adam(params, lr=0.01),
        schedule: LearningRates = "constant",
        mapping_lr: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(VisualPrompt(prompt, mapping), network, optimizer, schedule, name)
        self.mapping_lr = mapping_lr

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as an optimizer takes it."""
        return self.part.parameter_groups(self.mapping_lr)  # type: ignore[operator]

    @property
    def prompt(self) -> nn.Module:
        """The prompt."""
        return self.part.prompt  # type: ignore[return-value]

    @property
    def mapping(self) -> nn.Module | None:
        """The mapping."""
        return self.part.mapping  # type: ignore[return-value]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a mapping that nobody counts."""
        super().on_train_start(trainer, pl_module)
        check_fitted(self.mapping, type(self).__name__)
