"""Frozen networks by name, with what a prompt has to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_trust.core.host import close_names
from lightning_trust.core.saved_weights import load_weights
from lightning_trust.core.space import InputSpace
from lightning_trust.core.wrapping import checksum
from lightning_trust.nn.networks import create_network
from lightning_trust.nn.prompting.clip_classifier import ClipClassifier
from lightning_trust.nn.prompting.clip_templates import CLIP_TEMPLATES_81
from lightning_trust.nn.prompting.open_clip_models import create_clip, preprocessing

#: Names with one of these in front are of a library; others are of this package, or import paths.
LIBRARIES = ("timm", "torchvision", "open_clip")


@dataclass(frozen=True)
class BackboneSpec:
    """What is known of a backbone without looking at its weights.

    Args:
        name: Its name, as :func:`create_backbone` takes it.
        kind: ``"classifier"``, or ``"clip"`` whose outputs are texts.
        num_outputs: Number of source classes.
        channels: Channels of an image.
        image_size: Height and width that it was made for; None if any will do.
        mean: Mean per channel that is subtracted from raw images in [0, 1].
        std: Standard deviation per channel that they are divided by.
        class_names: Names of the source classes, as many as outputs; None if unknown.
        templates: Text templates of a ``"clip"``; empty for others.

    Raises:
        ValueError: If there are not as many names as outputs.

    """

    name: str
    kind: Literal["classifier", "clip"]
    num_outputs: int
    channels: int = 3
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.class_names is not None and len(self.class_names) != self.num_outputs:
            raise ValueError(
                f"Expected argument `class_names` to name the {self.num_outputs} outputs of '{self.name}',"
                f" but got {len(self.class_names)} names."
            )

    @property
    def input_space(self) -> InputSpace:
        """The box of raw images, [0, 1], and the normalisation; ``input_space.from_raw`` normalises."""
        return InputSpace(0.0, 1.0, self.mean, self.std)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a file."""
        return asdict(self)


class Backbone(nn.Module):
    r"""A network and what is known of it; frozen, unless it is to be trained.

    Frozen, no parameter requires a gradient, and the network stays in eval mode whatever ``train`` says, so that
    BatchNorm keeps its statistics. Gradients reach the images.

    Shape:
        - Input: normalised images ``(B, channels, H, W)``; ``spec.input_space.from_raw`` makes them of raw ones.
        - Output: logits of the source classes, ``(B, num_outputs)``.

    Args:
        network: The network.
        spec: What is known of it.
        frozen: Whether it is frozen; otherwise all that is frozen now is thawed, the text tower of CLIP excepted.

    Attributes:
        network: The network.
        spec: What is known of it.
        frozen: Whether it is frozen.

    Raises:
        ValueError: If images have another number of channels.

    Example:
        >>> backbone = create_backbone("SmallCNN", num_classes=40, in_channels=1, image_size=28)
        >>> backbone.num_source, backbone.train().network.training, backbone.kind
        (40, False, 'classifier')
        >>> len(backbone.sha256())
        64

    """

    def __init__(self, network: nn.Module, spec: BackboneSpec, frozen: bool = True) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.frozen = frozen
        network.requires_grad_(not frozen)
        if isinstance(network, ClipClassifier) and not frozen:
            # the bank is a constant: nothing would reach the text tower, and DDP refuses what is not used
            network.clip.requires_grad_(False)
            network.clip.visual.requires_grad_(True)
        self.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``(B, channels, H, W)`` -> logits ``(B, num_outputs)``."""
        if x.ndim != 4 or x.shape[1] != self.spec.channels:
            raise ValueError(
                f"Expected images of shape (B, {self.spec.channels}, H, W), as '{self.spec.name}' takes them,"
                f" but got {tuple(x.shape)}."
            )
        return self.network(x)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; a frozen network stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    @property
    def num_source(self) -> int:
        """Number of source classes."""
        return self.spec.num_outputs

    @property
    def source_names(self) -> tuple[str, ...] | None:
        """Names of the source classes; None if unknown."""
        return self.spec.class_names

    @property
    def kind(self) -> Literal["classifier", "clip"]:
        """``"classifier"`` or ``"clip"``."""
        return self.spec.kind

    def source_logits(self, x: Tensor) -> Tensor:
        """Normalised images -> logits of the source classes."""
        return self(x)

    def sha256(self) -> str:
        """SHA-256 over parameters and buffers, which tells whether a prompt was made for these weights.

        The bank of a CLIP model is left out: it follows from the model, the templates and the names, and differs in
        the last digits between machines.
        """
        return checksum(self.network.clip if isinstance(self.network, ClipClassifier) else self.network)


def create_backbone(
    name: str,
    pretrained: bool = False,
    checkpoint: str | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = CLIP_TEMPLATES_81,
    frozen: bool = True,
    network_args: dict[str, Any] | None = None,
) -> Backbone:
    """Build a network to be prompted by its name. Nothing is downloaded unless published weights are asked for.

    - ``"timm:resnet18"``, ``"timm:vit_tiny_patch16_224.augreg_in21k"``: of timm; ``pretrained=True`` asks for weights.
    - ``"torchvision:resnet50"``: of torchvision; ``pretrained=True`` asks for the default weights, and
      ``"torchvision:resnet50/IMAGENET1K_V2"`` for those.
    - ``"open_clip:ViT-B-32/openai"``: a CLIP model of open_clip with the weights of a tag, of a checkpoint file or
      folder, or of none (see :func:`~lightning_trust.nn.create_clip`). Its source classes are ``class_names`` in every
      one of ``templates``.
    - ``"SmallCNN"``, ``"my_package.nets.MyNet"``: of this package, or an import path; needs ``num_classes``. A path is
      imported and called: one from an untrusted file runs untrusted code.

    Args:
        name: Name of the network.
        pretrained: Whether to load published weights.
        checkpoint: File of weights: a Lightning checkpoint (also of a module that holds the network), a state dict or
            a safetensors file.
        num_classes: Number of source classes; that of the published weights if None.
        in_channels: Channels of an image.
        image_size: Side of the images that the network is made for; its own if None.
        mean: Mean of the raw pixels per channel; that of the published weights, or nought, if None.
        std: Standard deviation of the raw pixels; that of the published weights, or one, if None.
        class_names: Names of the source classes; known by themselves for published weights. For CLIP, the names of the
            target classes.
        templates: Text templates of CLIP.
        frozen: Whether to freeze the network.
        network_args: Further arguments of a network that is not CLIP.

    Returns:
        The network, with what is known of it in ``spec``.

    Raises:
        ValueError: If nobody knows the name, tag or file (close names are listed), or a number is out of its range.
        MisconfigurationException: If weights are asked for twice, or where there are none, or with another number of
            classes than they have; or CLIP has no class names or something that it cannot have.

    Example:
        >>> backbone = create_backbone("timm:test_resnet")
        >>> backbone.spec.image_size, backbone.spec.num_outputs, backbone.spec.mean
        ((160, 160), 1000, (0.5, 0.5, 0.5))
        >>> create_backbone("timm:resnet19")
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `name` to name a network of timm, but got 'timm:resnet19'. Close names:
        'resnet18'...

    """
    library, _, model = name.partition(":")
    if library == "open_clip":
        refused = {"num_classes": num_classes, "checkpoint": checkpoint, "network_args": network_args}
        wrong = [f"{key}={value!r}" for key, value in refused.items() if value] + (
            [f"in_channels={in_channels}"] if in_channels != 3 else []
        )
        if wrong or pretrained:
            raise MisconfigurationException(
                f"A CLIP model names its weights behind a slash ('open_clip:ViT-B-32/openai'), takes three channels and"
                f" has one output a text, but got {', '.join(wrong) or 'pretrained=True'}."
            )
        if class_names is None:
            raise MisconfigurationException(f"'{name}' needs the names of the target classes. Pass `class_names`.")
        network, tokenizer = create_clip(model, image_size=image_size)
        size, own_mean, own_std = preprocessing(network)
        classifier = ClipClassifier(network, tokenizer, class_names, templates)
        spec = BackboneSpec(
            name=name,
            kind="clip",
            num_outputs=classifier.num_source,
            image_size=size,
            mean=tuple(mean or own_mean),
            std=tuple(std or own_std),
            class_names=classifier.texts,
            templates=classifier.templates,
        )
        return Backbone(classifier, spec, frozen)

    if pretrained and checkpoint:
        raise MisconfigurationException(
            f"Expected one of arguments `pretrained` and `checkpoint`, but got pretrained=True and {checkpoint!r}."
        )
    arguments = dict(network_args or {})
    build = {"timm": _of_timm, "torchvision": _of_torchvision}.get(library if model else "", _of_path)
    built, known = build(name, pretrained, num_classes, in_channels, image_size, arguments)
    if checkpoint:
        load_weights(built, checkpoint, inside=True)
    for key, given in (("mean", mean), ("std", std)):
        if given is not None:
            known[key] = tuple(given)
        elif len(known.get(key, (0.0,))) not in (1, in_channels):
            # of three channels, for a network of one
            known[key] = (sum(known[key]) / len(known[key]),)
    if class_names is not None:
        known["class_names"] = tuple(class_names)
    if image_size is not None:
        known["image_size"] = (image_size, image_size)
    return Backbone(built, BackboneSpec(name=name, kind="classifier", channels=in_channels, **known), frozen)


Built = tuple[nn.Module, dict[str, Any]]


def _of_timm(
    name: str, pretrained: bool, classes: int | None, channels: int, size: int | None, arguments: dict[str, Any]
) -> Built:
    import timm
    from timm.data.config import resolve_model_data_config

    model = name.partition(":")[2]
    if not timm.is_model(model):
        raise _unknown("timm", name, timm.list_models())
    architecture, _, tag = model.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and model not in tags:
        raise _unknown("timm", name, tags)
    if pretrained and not tags:
        raise MisconfigurationException(f"timm has no published weights of '{name}'.")
    config: Any = timm.get_pretrained_cfg(model)
    own: int = config.num_classes
    _check_classes(name, pretrained, classes, own)
    if size is not None and config.fixed_input_size:
        arguments.setdefault("img_size", size)
    network = create_network(model, channels, classes or own, pretrained=pretrained, **arguments)
    data: dict[str, Any] = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    known = {
        "num_outputs": classes or own,
        "image_size": tuple(data["input_size"][-2:]),
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
    }
    if pretrained:
        known["class_names"] = _names_of_timm(network, own)
    return network, known


def _names_of_timm(network: nn.Module, count: int) -> tuple[str, ...] | None:
    """The first word for every class, where timm knows what the weights were trained on."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    config: Any = network.pretrained_cfg
    if config.get("label_names"):
        return tuple(config["label_names"])
    subset = infer_imagenet_subset(network)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index).partition(",")[0] for index in range(count))


def _of_torchvision(
    name: str, pretrained: bool, classes: int | None, channels: int, size: int | None, arguments: dict[str, Any]
) -> Built:
    import torchvision

    model, _, tag = name.partition(":")[2].partition("/")
    models = torchvision.models.list_models(module=torchvision.models)
    if model not in models:
        raise _unknown("torchvision", name, models)
    published = torchvision.models.get_model_weights(model)
    if tag and tag not in published.__members__:
        raise _unknown("torchvision", name, list(published.__members__))
    weights = published[tag] if tag else published.DEFAULT
    preset = weights.transforms()
    own = len(weights.meta["categories"])
    asked = pretrained or bool(tag)
    _check_classes(name, asked, classes, own)
    if size is not None and model.startswith("vit_"):
        arguments.setdefault("image_size", size)
    network = create_network(
        f"torchvision.models.{model}", channels, classes or own, weights=weights if asked else None, **arguments
    )
    side = preset.crop_size[0]
    known = {
        "num_outputs": classes or own,
        "image_size": (side, side),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }
    if asked:
        known["class_names"] = tuple(weights.meta["categories"])
    return network, known


def _of_path(
    name: str, pretrained: bool, classes: int | None, channels: int, size: int | None, arguments: dict[str, Any]
) -> Built:
    from lightning_trust.nn.networks import _OWN

    if name not in _OWN and ("." not in name or ":" in name):
        import timm

        library, _, model = name.rpartition(":")
        known = [*_OWN, *(f"timm:{each}" for each in timm.list_models())]
        raise ValueError(
            f"Expected argument `name` to be '<library>:<model>' with one of {list(LIBRARIES)}, a network of"
            f" lightning_trust.nn or an import path, but got {name!r}."
            f" Close names: {close_names(name if not library else f'timm:{model}', known)}."
        )
    if pretrained:
        raise MisconfigurationException(f"'{name}' has no published weights. Pass `checkpoint='<file>'`.")
    if classes is None:
        raise MisconfigurationException(f"'{name}' does not say how many classes it has. Pass `num_classes`.")
    return create_network(name, channels, classes, **arguments), {"num_outputs": classes}


def _unknown(library: str, name: str, known: list[str]) -> ValueError:
    _, _, model = name.partition(":")
    return ValueError(
        f"Expected argument `name` to name a network of {library}, but got {name!r}."
        f" Close names: {close_names(model.rpartition('/')[2] or model, known)}."
    )


def _check_classes(name: str, weights: bool, asked: int | None, own: int) -> None:
    if not (asked or own):
        raise MisconfigurationException(f"'{name}' has features and no classes. Pass `num_classes` and a `checkpoint`.")
    if weights and asked not in (None, own):
        raise MisconfigurationException(
            f"The published weights of '{name}' have {own} classes, but got num_classes={asked}: its last layer would"
            " be of random weights. Leave `num_classes` out, and map the classes."
        )
