"""One configuration of visual prompting: what AutoVP compares, builds and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
import yaml  # type: ignore[import-untyped]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.callbacks import IterativeLabelMapping, ScaleMonitor
from lightning_trust.core.files import write_text
from lightning_trust.core.learning_rates import LearningRates
from lightning_trust.core.schedules import Steps
from lightning_trust.functional.prompting import check_enough_sources
from lightning_trust.modules import VisualPromptClassifier
from lightning_trust.nn import FramePrompt, FullyMapping, LabelMapping, LearnableScale

MappingName = Literal["fully", "frequency", "iterative", "semantic"]
#: where in a run the learning rate of classifiers falls to a tenth, and to a hundredth
_MILESTONES = (0.5, 0.72)


@dataclass(frozen=True)
class VPConfig:
    r"""A configuration of visual prompting with a frame.

    "AutoVP: An Automated Visual Prompting Framework and Benchmark" (ICLR 2024). Images are placed on the canvas at a
    scale, given or learned; a frame is learned around them; the frozen backbone looks at the result, and its outputs
    are mapped to the classes of the task. Classifiers squash the frame with a sigmoid and train with Adam; CLIP leaves
    it as it is, trains with SGD and momentum 0.9, and starts a full mapping at the identity. Either way frame and image
    are normalised together as the backbone wants it, so data come raw, in [0, 1].

    Args:
        backbone: Name of the frozen network, as :func:`~lightning_trust.nn.create_backbone` takes it.
        num_source: Its outputs.
        num_target: Classes of the task.
        backbone_args: Further arguments of ``create_backbone``.
        kind: ``"classifier"`` or ``"clip"``.
        mapping: ``"fully"``, ``"frequency"``, ``"iterative"`` or ``"semantic"``.
        num_map: Source classes of each target class, whose logits are averaged; 1 for ``"fully"``.
        scale: Scale of the images at first.
        learn_scale: Whether it is learned.
        image_size: Side of the images in pixels.
        out_size: Side of the canvas.
        channels: Channels of the backbone.
        mean: What the backbone wants subtracted from each channel.
        std: What it wants each channel divided by.
        lr: Learning rate of the frame.
        mapping_lr: Learning rate of scale and full mapping; that of the frame if None.
        weight_decay: Weight decay.
        interval_epochs: Epochs between two counts of ``"iterative"``.
        indices: Source classes of each target class, for ``"semantic"``; they are read off the names by
            :class:`VPSearchSpace`.
        label: Name of the backbone in tables.
        network: The backbone, where it is built already. Such a configuration cannot be written.

    Raises:
        ValueError: If there are too few source classes, or an argument is out of its range.
        MisconfigurationException: If the mapping is ``"semantic"`` and there are no names to read: the backbone is CLIP
            or there are no ``indices``.

    Example:
        >>> config = VPConfig(
        ...     "SmallCNN", 40, 10, {"num_classes": 40, "in_channels": 1}, image_size=16, out_size=28, channels=1
        ... )
        >>> config.build()(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
        >>> print(config)
        SmallCNN, fully, scale 1.0 learned, lr 0.001

    """

    backbone: str
    num_source: int
    num_target: int
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    kind: Literal["classifier", "clip"] = "classifier"
    mapping: MappingName = "fully"
    num_map: int = 1
    scale: float = 1.0
    learn_scale: bool = True
    image_size: int = 128
    out_size: int = 224
    channels: int = 3
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    lr: float = 1e-3
    mapping_lr: float | None = 1e-3
    weight_decay: float = 0.0
    interval_epochs: int = 1
    indices: Sequence[Sequence[int]] | None = None
    label: str = ""
    network: nn.Module | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for argument, value, words in (
            ("kind", self.kind, ("classifier", "clip")),
            ("mapping", self.mapping, get_args(MappingName)),
        ):
            if value not in words:
                raise ValueError(f"Expected argument `{argument}` to be one of {list(words)}, but got {value!r}.")
        if self.lr < 0 or self.weight_decay < 0 or (self.mapping_lr or 0.0) < 0:
            raise ValueError(
                "Expected arguments `lr`, `mapping_lr` and `weight_decay` not to be negative, but got"
                f" {self.lr}, {self.mapping_lr} and {self.weight_decay}."
            )
        if self.mapping == "semantic" and (self.kind == "clip" or self.indices is None):
            raise MisconfigurationException(
                "mapping='semantic': a semantic mapping needs named source classes"
                + (
                    f", but those of the CLIP model '{self.name}' are texts of the target classes already."
                    if self.kind == "clip"
                    else f" and what they mean, but '{self.name}' came without `indices`. Let VPSearchSpace find them."
                )
            )
        # what is wrong about sizes and numbers of classes is said by the parts, and now
        self.scaling()
        if self.mapping != "fully":
            self.output_mapping()
        elif self.kind == "clip":
            # the identity; building it would draw random numbers
            check_enough_sources(self.num_source, self.num_target, 1)

    @property
    def name(self) -> str:
        """Name of the backbone in tables."""
        return self.label or self.backbone

    def __str__(self) -> str:
        """In a few words."""
        sources = "" if self.mapping == "fully" else f" m={self.num_map}"
        learned = "learned" if self.learn_scale else "fixed"
        decay = f", weight decay {self.weight_decay:g}" if self.weight_decay else ""
        return f"{self.name}, {self.mapping}{sources}, scale {self.scale} {learned}, lr {self.lr:g}{decay}"

    def scaling(self) -> LearnableScale:
        """What places the images."""
        return LearnableScale(
            self.image_size, self.out_size, self.channels, init=self.scale, trainable=self.learn_scale
        )

    def prompt(self) -> FramePrompt:
        """The frame, untrained."""
        squash: Literal["sigmoid", "none"] = "none" if self.kind == "clip" else "sigmoid"
        return FramePrompt(self.scaling(), squash, mean=self.mean, std=self.std)

    def output_mapping(self) -> LabelMapping | FullyMapping:
        """The mapping, untrained."""
        if self.mapping == "fully":
            return FullyMapping(self.num_source, self.num_target, "identity" if self.kind == "clip" else "default")
        if self.mapping == "semantic":
            return LabelMapping(self.num_source, self.num_target, "fixed", self.num_map, indices=self.indices)
        return LabelMapping(self.num_source, self.num_target, self.mapping, self.num_map)

    def callbacks(self) -> list[pl.Callback]:
        """What a run needs beside the module: the counts of a mapping that is counted, and the log of the scale."""
        counted = self.mapping in ("frequency", "iterative")
        counting: list[pl.Callback] = [IterativeLabelMapping(self.interval_epochs)] if counted else []
        return [*counting, ScaleMonitor()]

    def schedule(self, max_epochs: int | None) -> LearningRates:
        """The paper's learning rates: along a cosine for CLIP, else a tenth after 0.5 and 0.72 of the epochs.

        Args:
            max_epochs: Epochs of the run; the cosine if None.

        """
        if max_epochs is None or self.kind == "clip":
            return "cosine"
        return Steps([1.0, 0.1, 0.01], [share * max_epochs for share in _MILESTONES])

    def build(
        self,
        network: nn.Module | None = None,
        max_epochs: int | None = None,
        schedule: LearningRates | None = None,
    ) -> VisualPromptClassifier:
        """A module to train; its Trainer needs :meth:`callbacks`.

        Args:
            network: The backbone, where it is built already.
            max_epochs: Epochs of the run, for the schedule.
            schedule: Learning rates over the run; those of :meth:`schedule` if None.

        """
        network = network or self.network
        kind, arguments = self._optimizer()
        return VisualPromptClassifier(
            network or self.backbone,
            self.prompt(),
            self.output_mapping(),
            num_classes=self.num_target,
            backbone_args=None if network is not None else dict(self.backbone_args),
            optimizer=partial(kind, **arguments),
            schedule=schedule or self.schedule(max_epochs),
            mapping_lr=self.mapping_lr,
        )

    def as_dict(
        self,
        max_epochs: int = 200,
        data: Mapping[str, Any] | None = None,
        trainer: Mapping[str, Any] | None = None,
        seed: int = 1,
    ) -> dict[str, Any]:
        """What :meth:`write` writes.

        Raises:
            MisconfigurationException: If the backbone was given as a module, which has no name to be built by.

        """
        if self.network is not None:
            raise MisconfigurationException(
                f"The backbone '{self.name}' was given as a {type(self.network).__name__} that is built already, and a"
                " file cannot hold it. Give VPSearchSpace its name and the arguments of `create_backbone` instead."
            )
        kind, arguments = self._optimizer()
        schedule = self.schedule(max_epochs)
        content: dict[str, Any] = {
            "seed_everything": seed,
            "model": _node(
                "VisualPromptClassifier",
                {
                    "backbone": self.backbone,
                    "prompt": _prompt_node(self.prompt()),
                    "mapping": _node(type(self.output_mapping()).__name__, _arguments(self.output_mapping())),
                    "num_classes": self.num_target,
                    "backbone_args": _plain(self.backbone_args),
                    "optimizer": _node(f"torch.optim.{kind.__name__}", arguments),
                    "schedule": schedule if isinstance(schedule, str) else _node("Steps", _plain(vars(schedule))),
                    "mapping_lr": self.mapping_lr,
                },
            ),
        }
        if data is not None:
            content["data"] = _plain(data)
        counting = {"interval_epochs": self.interval_epochs, "max_batches": None, "batch_spec": None, "name": None}
        saving = {"folder": "prompt", "class_names": None, "source_names": None}
        keeping = {"save_top_k": 0, "save_last": True, "enable_version_counter": False}
        content["trainer"] = {
            "accelerator": "auto",
            "devices": 1,
            "max_epochs": max_epochs,
            **_plain(trainer or {}),
            "callbacks": [
                *([_node("IterativeLabelMapping", counting)] if self.mapping in ("frequency", "iterative") else []),
                _node("ScaleMonitor", {}),
                _node("SavePrompt", saving),
                _node("ModelCheckpoint", keeping),
                *_plain((trainer or {}).get("callbacks", [])),
            ],
        }
        return content

    def write(
        self,
        path: str | Path,
        max_epochs: int = 200,
        data: Mapping[str, Any] | None = None,
        trainer: Mapping[str, Any] | None = None,
        seed: int = 1,
    ) -> Path:
        """Write a file that ``lightning-trust fit --config`` runs.

        Args:
            path: The file.
            max_epochs: Epochs of the run.
            data: The section ``data``, ``{"class_path": ..., "init_args": {...}}``; if None, the file has none and the
                user's own comes with a ``--config`` of its own.
            trainer: Further arguments of the Trainer; callbacks come after those that the run needs.
            seed: That of ``seed_everything``.

        Returns:
            The file.

        Raises:
            MisconfigurationException: If the backbone was given as a module, which has no name to be built by.

        """
        content = yaml.safe_dump(self.as_dict(max_epochs, data, trainer, seed), sort_keys=False, width=110)
        return write_text(path, f"# AutoVP: {self}\n#   lightning-trust fit --config {path}\n{content}")

    def _optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        if self.kind == "clip":
            return torch.optim.SGD, {"lr": self.lr, "momentum": 0.9, "weight_decay": self.weight_decay}
        return torch.optim.Adam, {"lr": self.lr, "weight_decay": self.weight_decay}


def _node(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": name, "init_args": dict(arguments)}


def _arguments(module: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = _plain(dict(module.hparams))
    return arguments


def _prompt_node(prompt: FramePrompt) -> dict[str, Any]:
    scale = _node("LearnableScale", _arguments(prompt.scale))
    return _node("FramePrompt", {"scale": scale, **_arguments(prompt)})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
