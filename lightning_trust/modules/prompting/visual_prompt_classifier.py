"""A frozen classifier, reused for another task by a prompt: a complete recipe."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_trust.core.learning_rates import LearningRates, scheduled
from lightning_trust.core.wrapping import Surrounded
from lightning_trust.modules.image_classifier import ImageClassifier
from lightning_trust.nn import VisualPrompt, create_backbone
from lightning_trust.nn.prompting.label_mapping import check_fitted


class VisualPromptClassifier(ImageClassifier):
    r"""Train a prompt, and what the outputs of a frozen network mean, for a new task.

    "Understanding and Improving Visual Prompting: A Label-Mapping Perspective" (CVPR 2023). The logits are
    :math:`\pi(f(p(x)))` with a frozen network :math:`f`; the loss is their cross-entropy. A mapping that is counted
    needs :class:`~lightning_trust.callbacks.IterativeLabelMapping`. Whoever has a LightningModule already adds
    :class:`~lightning_trust.callbacks.VisualPrompting` to its run instead.

    Logs ``train/loss`` per step, and ``val/loss``, ``val/acc``, ``test/loss``, ``test/acc`` per epoch.

    Args:
        backbone: Name of the frozen network (``"timm:resnet18"``, ``"torchvision:resnet50"``,
            ``"open_clip:ViT-B-32/openai"``, a network of this package, an import path; see
            :func:`lightning_trust.nn.create_backbone`), or the network itself.
        prompt: Inputs of the task to inputs of the network, such as :class:`~lightning_trust.nn.PadPrompt`.
        mapping: Outputs of the network to those of the task, such as :class:`~lightning_trust.nn.LabelMapping`; they
            stay as they are if None.
        num_classes: Number of classes of the task.
        backbone_args: Further arguments of a network given by name, e.g. ``{"pretrained": true}``.
        optimizer: Called with what is trained, gives the optimizer; Adam with learning rate 0.01 by default.
        schedule: ``"cosine"``, ``"cyclic"`` or ``"constant"`` learning rate, or a schedule of core.schedules.
        mapping_lr: Learning rate of what is trained beside the pattern, such as a scale and the weights of a mapping;
            that of ``optimizer`` if None.

    Attributes:
        network: The frozen network with prompt and mapping around it.

    Raises:
        ValueError: If nobody knows the name of the network, or an argument is out of its range.
        MisconfigurationException: If ``backbone_args`` are given with a network that is built already.

    Example:
        >>> from lightning_trust.nn import LabelMapping, PadPrompt
        >>> model = VisualPromptClassifier(
        ...     "SmallCNN",
        ...     PadPrompt(image_size=16, out_size=28, channels=1),
        ...     LabelMapping(40, 10, "identity"),
        ...     num_classes=10,
        ...     backbone_args={"num_classes": 40, "in_channels": 1},
        ... )
        >>> model(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        784

    """

    built_arguments: ClassVar[tuple[str, ...]] = ("backbone", "prompt", "mapping")

    def __init__(
        self,
        backbone: str | nn.Module,
        prompt: nn.Module,
        mapping: nn.Module | None = None,
        num_classes: int = 10,
        backbone_args: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.01),
        schedule: LearningRates = "cosine",
        mapping_lr: float | None = None,
    ) -> None:
        if isinstance(backbone, nn.Module) and backbone_args:
            raise MisconfigurationException(
                f"Argument `backbone_args` is for a network given by name, but got backbone_args={backbone_args} and a"
                f" {type(backbone).__name__} that is built already."
            )
        network = create_backbone(backbone, **(backbone_args or {})) if isinstance(backbone, str) else backbone
        super().__init__(
            Surrounded(network, VisualPrompt(prompt, mapping)),
            num_classes=num_classes,
            optimizer=optimizer,
            schedule=schedule,
        )
        self.mapping_lr = mapping_lr

    @property
    def prompt(self) -> nn.Module:
        """The prompt."""
        return self.network.part.prompt  # type: ignore[union-attr, return-value]

    @property
    def mapping(self) -> nn.Module | None:
        """The mapping."""
        return self.network.part.mapping  # type: ignore[union-attr, return-value]

    def on_train_start(self) -> None:
        """Refuse a mapping that nobody counts."""
        check_fitted(self.mapping, type(self).__name__)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """An optimizer of what is trained, and its learning rate per step unless it is constant."""
        groups = self.network.part.parameter_groups(self.mapping_lr)  # type: ignore[union-attr, operator]
        return scheduled(self._make_optimizer(groups), self.schedule, self)
