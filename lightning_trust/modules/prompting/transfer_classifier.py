"""Finetuning of a pretrained classifier on a target task: its last layer alone, or all of it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_trust.core.host import close_names
from lightning_trust.core.learning_rates import LearningRates, scheduled
from lightning_trust.core.saved_weights import load_weights
from lightning_trust.modules.image_classifier import ImageClassifier

Mode = Literal["lp", "ff"]


class TransferClassifier(ImageClassifier):
    r"""An :class:`ImageClassifier` that starts from a network pretrained on another task, with a new last layer.

    The two ways of finetuning of "Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer
    Learning" (NeurIPS 2023), each with a learning rate that falls to zero along a cosine: a linear probe, where the
    rest of the network is frozen and stays in eval mode (there: Adam, learning rate 0.01, 50 epochs, batch 128, no
    augmentation), and full finetuning (Adam, learning rate 1e-4, 200 epochs, augmentation).

    Logs and batches are those of :class:`ImageClassifier`.

    Args:
        network: Name of a network, or the network itself, whose last layer is replaced then.
        source_classes: Number of classes that it was pretrained on, where it is given by name; that of the kept ones
            where labels were remapped.
        checkpoint: File of its weights: a Lightning checkpoint, also of a module that holds it such as
            ImageClassifier, a state dict or a safetensors file. They are loaded when a run is first set up, before a
            checkpoint that the run is resumed from. None to start from the network as it is.
        mode: ``"lp"`` trains the last layer alone, ``"ff"`` all layers.
        num_classes: Number of classes of the target.
        in_channels: Channels of an image; not looked at where ``network`` is a module.
        network_args: Further arguments of a network given by name.
        head: Name of the last layer; the last linear one if None.
        optimizer: Called with the parameters that are trained, gives the optimizer. By default Adam with learning rate
            0.01, which is meant for ``"lp"``.
        schedule: As in :class:`ImageClassifier`.

    Attributes:
        head: Name of the last layer.

    Raises:
        ValueError: If ``mode`` is another word, or the network has no such layer; in ``setup``, if the file is of
            another architecture.
        FileNotFoundError: In ``setup``, if there is no such file.

    Example:
        >>> probe = TransferClassifier("SmallCNN", source_classes=30, num_classes=5)
        >>> [name for name, parameter in probe.named_parameters() if parameter.requires_grad]
        ['network.classifier.weight', 'network.classifier.bias']

    """

    def __init__(
        self,
        network: str | nn.Module = "SmallCNN",
        source_classes: int = 1000,
        checkpoint: str | None = None,
        mode: Mode = "lp",
        num_classes: int = 10,
        in_channels: int = 1,
        network_args: dict[str, Any] | None = None,
        head: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.01),
        schedule: LearningRates = "cosine",
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"Expected argument `mode` to be one of {list(get_args(Mode))}, but got {mode!r}.")
        # by name, the network comes with a last layer of as many classes as the target has
        super().__init__(network, num_classes, in_channels, network_args, optimizer, schedule)
        self.checkpoint = checkpoint
        self.mode = mode
        self.head, layer = _head(self.network, head)
        self.source_classes = source_classes if isinstance(network, str) else layer.out_features
        if isinstance(network, nn.Module):
            self._put(nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None))
        if mode == "lp":
            self.network.requires_grad_(False)
            self.last_layer.requires_grad_(True)
            # Lightning trains in the modes that it finds
            self.network.train(False)
        self._has_weights = checkpoint is None

    @property
    def last_layer(self) -> nn.Linear:
        """The last layer."""
        return self.network.get_submodule(self.head)  # type: ignore[return-value]

    def _put(self, layer: nn.Linear) -> None:
        parent, _, name = self.head.rpartition(".")
        setattr(self.network.get_submodule(parent), name, layer)

    def setup(self, stage: str) -> None:
        """Load what was pretrained, once."""
        if self._has_weights or self.checkpoint is None:
            return
        own = self.last_layer
        bias = own.bias is not None
        self._put(torch.nn.utils.skip_init(nn.Linear, own.in_features, self.source_classes, bias=bias))
        try:
            load_weights(self.network, self.checkpoint, inside=True)
        finally:
            self._put(own)
        self._has_weights = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Weights of this module's own are there: those from which they came are not wanted any more."""
        self._has_weights = True

    def train(self, mode: bool = True) -> TransferClassifier:
        """Set the training mode; what is frozen stays in eval mode."""
        super().train(mode)
        if self.mode == "lp":
            self.network.train(False)
        return self

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """An optimizer of what is trained, and its learning rate per step unless it is constant."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return scheduled(self._make_optimizer(trained), self.schedule, self)


def _head(network: nn.Module, name: str | None) -> tuple[str, nn.Linear]:
    """Name of the last layer, and the layer."""
    linear = {key: module for key, module in network.named_modules() if key and isinstance(module, nn.Linear)}
    if name is None and linear:
        name = list(linear)[-1]
    if name is None or name not in linear:
        raise ValueError(
            f"Expected argument `head` to name a linear layer within {type(network).__name__}, but got {name!r}."
            f" Close names: {close_names(name or '', linear)}."
        )
    return name, linear[name]
