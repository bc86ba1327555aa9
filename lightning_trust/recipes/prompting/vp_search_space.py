"""What AutoVP searches over."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from lightning_trust.nn import Backbone, ClipTextEncoder, LabelMapping, TextEncoder, create_backbone, name_similarity
from lightning_trust.recipes.prompting.vp_config import MappingName, VPConfig

#: of the paper: for Adam; and for SGD on the frame of CLIP in its normalised space
_ADAM, _SGD = 1e-3, 40.0


@dataclass(frozen=True)
class VPSearchSpace:
    """A space of configurations of visual prompting: every backbone, mapping, scale and learning rate with every other.

    "AutoVP: An Automated Visual Prompting Framework and Benchmark" (ICLR 2024). What cannot be is left out, and a line
    of the log says so: more sources for each class than the backbone has, and a semantic mapping of CLIP, whose source
    classes are texts of the target classes already.

    Args:
        backbones: Name in tables -> the frozen network: a name for :func:`~lightning_trust.nn.create_backbone`, its
            arguments with ``name`` among them, or a :class:`~lightning_trust.nn.Backbone` that is built already. A CLIP
            model gets the names of the task's classes by itself.
        mapping: Which of ``"fully"``, ``"frequency"``, ``"iterative"`` and ``"semantic"``.
        num_map: Source classes of each target class; ``"fully"`` has one choice whatever they are.
        scale: Scales of the images, at first where they are learned.
        learn_scale: Whether the scale is learned.
        lr: Learning rates of the frame; None is the paper's: 0.001 with Adam, and for CLIP 40 with SGD on a frame in
            normalised space, which in raw space is 40 times the squared standard deviation.
        weight_decay: Weight decays.
        mapping_lr: Learning rate of scale and full mapping; that of the frame if None.
        image_size: Side of the images in pixels.
        out_size: Side of the canvas, for backbones that do not say what they take.
        interval_epochs: Epochs between two counts of ``"iterative"``.
        text_encoder: Reads names for ``"semantic"``; the name of an open_clip model will do.
        target_names: Names of the classes; those of the datamodule if None.
        num_target: Number of classes of the task; that of the names if None.

    Raises:
        ValueError: If the space is empty, or a word is unknown.

    Example:
        >>> narrow = {"name": "SmallCNN", "num_classes": 40, "in_channels": 1, "image_size": 28}
        >>> space = VPSearchSpace({"narrow": narrow}, num_map=(1, 5), scale=(0.5, 1.0), image_size=16)
        >>> grid = space.grid(num_target=10)
        >>> len(grid)
        12
        >>> print(next(grid.configs()))
        narrow, fully, scale 0.5 learned, lr 0.001

    """

    backbones: Mapping[str, str | Mapping[str, Any] | Backbone]
    mapping: Sequence[MappingName] = ("fully", "frequency", "iterative")
    num_map: Sequence[int] = (1, 5, 10)
    scale: Sequence[float] = (0.5, 1.0, 1.5)
    learn_scale: Sequence[bool] = (True, False)
    lr: Sequence[float | None] = (None,)
    weight_decay: Sequence[float] = (0.0,)
    mapping_lr: float | None = 1e-3
    image_size: int = 128
    out_size: int = 224
    interval_epochs: int = 1
    text_encoder: TextEncoder | str | None = field(default=None, repr=False)
    target_names: Sequence[str] | None = None
    num_target: int | None = None

    def __post_init__(self) -> None:
        for argument in ("backbones", "mapping", "num_map", "scale", "learn_scale", "lr", "weight_decay"):
            value = getattr(self, argument)
            if isinstance(value, str) or not len(value):
                raise ValueError(
                    f"Expected argument `{argument}` to hold at least one choice, or the search space is empty,"
                    f" but got {value!r}."
                )
            if len(set(value)) != len(value):
                raise ValueError(f"Expected argument `{argument}` to hold each choice once, but got {list(value)}.")
        for argument, words in (("mapping", ("fully", "frequency", "iterative", "semantic")),):
            unknown = [word for word in getattr(self, argument) if word not in words]
            if unknown:
                raise ValueError(f"Expected argument `{argument}` to hold some of {list(words)}, but got {unknown}.")
        if min(self.scale) <= 0:
            raise ValueError(f"Expected argument `scale` to hold numbers above zero, but got {list(self.scale)}.")
        if min(self.num_map) < 1:
            raise ValueError(
                f"Expected argument `num_map` to hold numbers of at least 1, but got {list(self.num_map)}."
            )

    @classmethod
    def around(cls, config: VPConfig, **changes: Any) -> VPSearchSpace:
        """A space that holds one configuration, for a second search, over ``lr`` and ``weight_decay`` say.

        Args:
            config: The configuration.
            changes: Arguments of this class that differ.

        Example:
            >>> config = VPConfig("SmallCNN", 40, 10, {"num_classes": 40, "in_channels": 1}, channels=1)
            >>> len(VPSearchSpace.around(config, lr=(1e-2, 1e-3, 1e-4), weight_decay=(0, 1e-5, 1e-10)).grid(10))
            9

        """
        backbone: Any = config.network or {"name": config.backbone, **config.backbone_args}
        own: dict[str, Any] = {
            "backbones": {config.name: backbone},
            "mapping": (config.mapping,),
            "num_map": (config.num_map,),
            "scale": (config.scale,),
            "learn_scale": (config.learn_scale,),
            "lr": (config.lr,),
            "weight_decay": (config.weight_decay,),
            "mapping_lr": config.mapping_lr,
            "image_size": config.image_size,
            "out_size": config.out_size,
            "interval_epochs": config.interval_epochs,
        }
        return cls(**{**own, **changes})

    def grid(self, num_target: int | None = None, target_names: Sequence[str] | None = None) -> VPGrid:
        """All that there is in the space, for a task.

        Args:
            num_target: Number of classes of the task, where this space does not say it.
            target_names: Their names, where this space does not say them.

        Raises:
            ValueError: If nothing is left, or sizes do not fit.
            MisconfigurationException: If the number of classes is unknown, or a semantic mapping has no names or no
                text encoder.

        """
        names = self.target_names or target_names
        count = self.num_target or (len(names) if names else num_target)
        if count is None:
            raise MisconfigurationException(
                "AutoVP needs the number of classes of the task. Pass `num_target` or `target_names` to VPSearchSpace,"
                " or a datamodule with `class_names`."
            )
        if names is not None and len(names) != count:
            raise ValueError(f"Expected argument `target_names` to hold {count} names, but got {len(names)}.")
        bases = {label: self._base(label, choice, count, names) for label, choice in self.backbones.items()}
        networks = {label: network for label, (_, network) in bases.items()}
        families = {}
        for label, (base, network) in bases.items():
            families.update({str(family): config for family, config in self._families(label, base, network, names)})
        if not families:
            raise ValueError(
                "Expected a search space with at least one configuration, but none of"
                f" mapping={list(self.mapping)} with num_map={list(self.num_map)} can be had of"
                f" {list(self.backbones)} for {count} classes."
            )
        values: dict[str, list[Any]] = {
            "family": list(families),
            "scale": [float(scale) for scale in self.scale],
            "learn_scale": list(self.learn_scale),
            "lr": list(self.lr),
            "weight_decay": [float(decay) for decay in self.weight_decay],
        }
        grid = VPGrid(values, families, networks)
        # sizes are looked at before the first trial
        for scale in grid.values["scale"]:
            grid.config({**{name: some[0] for name, some in values.items()}, "scale": scale})
        return grid

    def _base(
        self, label: str, choice: str | Mapping[str, Any] | Backbone, count: int, names: Sequence[str] | None
    ) -> tuple[VPConfig, Backbone]:
        """A backbone and a configuration with what is known of it."""
        arguments: dict[str, Any] = {}
        if isinstance(choice, Backbone):
            backbone, name = choice, choice.spec.name
        elif isinstance(choice, (str, Mapping)):
            arguments = {} if isinstance(choice, str) else dict(choice)
            name = choice if isinstance(choice, str) else arguments.pop("name", None)
            if not isinstance(name, str):
                raise ValueError(
                    f"Expected `backbones['{label}']` to have a `name` for create_backbone, but got {choice!r}."
                )
            if name.startswith("open_clip:") and names is not None:
                arguments.setdefault("class_names", list(names))
            backbone = create_backbone(name, **arguments)
        else:
            raise ValueError(
                f"Expected `backbones['{label}']` to be a name, the arguments of create_backbone or a Backbone, but got"
                f" a {type(choice).__name__}. Backbone(network, BackboneSpec(...)) makes one of a module."
            )
        spec = backbone.spec
        height, width = spec.image_size or (self.out_size, self.out_size)
        if height != width:
            raise ValueError(f"Expected backbones with a square input, but '{label}' takes {height} x {width} pixels.")
        clip = spec.kind == "clip"
        rate = float(f"{_SGD * sum(value**2 for value in spec.std) / len(spec.std):.3g}") if clip else _ADAM
        plain = set(spec.mean) == {0.0} and set(spec.std) == {1.0}
        base = VPConfig(
            name,
            spec.num_outputs,
            count,
            arguments,
            spec.kind,
            image_size=self.image_size,
            out_size=height,
            channels=spec.channels,
            mean=None if plain else _per_channel(spec.mean, spec.channels),
            std=None if plain else _per_channel(spec.std, spec.channels),
            lr=rate,
            mapping_lr=self.mapping_lr,
            interval_epochs=self.interval_epochs,
            label=label,
            network=choice if isinstance(choice, Backbone) else None,
        )
        return base, backbone

    def _families(
        self, label: str, base: VPConfig, backbone: Backbone, names: Sequence[str] | None
    ) -> Iterator[tuple[str, VPConfig]]:
        """What one backbone can be mapped by."""
        for mapping in self.mapping:
            if mapping == "semantic" and base.kind == "clip":
                if all(_is_clip(choice) for choice in self.backbones.values()):
                    raise MisconfigurationException(
                        "mapping='semantic': a semantic mapping needs named source classes, but those of the CLIP model"
                        f" '{label}' are texts of the target classes already. Leave it out of `mapping`."
                    )
                rank_zero_info(f"AutoVP leaves out semantic mapping of '{label}': its source classes are texts.")
                continue
            if mapping == "fully":
                yield f"{label} / fully", replace(base, mapping="fully")
                continue
            for many in self.num_map:
                if many * base.num_target > base.num_source:
                    rank_zero_info(
                        f"AutoVP leaves out num_map={many} of '{label}' ({mapping}): {many} x {base.num_target} classes"
                        f" are more than its {base.num_source}."
                    )
                    continue
                indices = self._semantic(label, base, backbone, names, many) if mapping == "semantic" else None
                yield (
                    f"{label} / {mapping} / {many}",
                    replace(base, mapping=mapping, num_map=many, indices=indices),
                )

    def _semantic(
        self, label: str, base: VPConfig, backbone: Backbone, names: Sequence[str] | None, many: int
    ) -> list[list[int]]:
        sources = backbone.source_names
        missing = {
            "named source classes": sources,
            "named target classes": names,
            "a `text_encoder`": self.text_encoder,
        }
        for what, value in missing.items():
            if value is None:
                raise MisconfigurationException(
                    f"mapping='semantic': a semantic mapping needs {what}, but there are none for '{label}'."
                    + (" Give create_backbone its `class_names`." if what.startswith("named source") else "")
                )
        encoder: Any = ClipTextEncoder(self.text_encoder) if isinstance(self.text_encoder, str) else self.text_encoder
        mapping = LabelMapping(base.num_source, base.num_target, "semantic", many)
        mapping.fit_similarity(name_similarity(sources or (), names or (), encoder))
        found: list[list[int]] = mapping.indices.tolist()
        return found


@dataclass(frozen=True)
class VPGrid:
    """The configurations of a :class:`VPSearchSpace` for one task.

    Args:
        values: Name of a choice -> its values; every combination is a configuration.
        families: Backbone, mapping and number of sources, as one of ``values["family"]`` -> a configuration with them.
        networks: Name of a backbone -> the backbone.

    """

    values: Mapping[str, Sequence[Any]]
    families: Mapping[str, VPConfig]
    networks: Mapping[str, Backbone]

    def __len__(self) -> int:
        """Number of configurations."""
        count = 1
        for some in self.values.values():
            count *= len(some)
        return count

    def config(self, choices: Mapping[str, Any]) -> VPConfig:
        """The configuration of some choices."""
        base = self.families[choices["family"]]
        return replace(
            base,
            scale=choices["scale"],
            learn_scale=choices["learn_scale"],
            lr=base.lr if choices["lr"] is None else choices["lr"],
            weight_decay=choices["weight_decay"],
        )

    def network(self, config: VPConfig) -> Backbone:
        """The backbone of a configuration, built."""
        return self.networks[config.label]

    def configs(self) -> Iterator[VPConfig]:
        """All of them, in the order of the values."""
        for combination in itertools.product(*self.values.values()):
            yield self.config(dict(zip(self.values, combination, strict=True)))

    def fingerprint(self) -> str:
        """What tells this grid from another one; weights are told by :meth:`~lightning_trust.nn.Backbone.sha256`."""
        weights = {label: network.sha256() for label, network in self.networks.items()}
        families = {name: repr(config) for name, config in self.families.items()}
        return json.dumps([dict(self.values), families, weights], sort_keys=True, default=str)


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) * (channels if len(values) == 1 else 1)


def _is_clip(choice: Any) -> bool:
    if isinstance(choice, Backbone):
        return choice.kind == "clip"
    name = choice if isinstance(choice, str) else choice.get("name", "")
    return isinstance(name, str) and name.startswith("open_clip:")
