"""Networks by name: this package's own, timm's, torchvision's, or any import path."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.nn.adversarial.convert import moe_resnet18, moe_small_cnn
from lightning_trust.nn.mlp import MLP
from lightning_trust.nn.resnet import resnet18_small, resnet20
from lightning_trust.nn.small_cnn import SmallCNN, check_sizes

_OWN: dict[str, Callable[..., nn.Module]] = {
    "MLP": MLP,
    "SmallCNN": SmallCNN,
    "moe_resnet18": moe_resnet18,
    "moe_small_cnn": moe_small_cnn,
    "resnet18_small": resnet18_small,
    "resnet20": resnet20,
}


def create_network(name: str, in_channels: int = 3, num_classes: int = 10, **arguments: Any) -> nn.Module:
    """Build a classifier of images by its name.

    A name is looked up in this order, and the first that knows it builds the network:

    1. this package: ``"MLP"``, ``"SmallCNN"``, ``"moe_resnet18"``, ``"moe_small_cnn"``, ``"resnet18_small"``,
       ``"resnet20"``;
    2. timm, a pre-trained tag included: ``"resnet18"``, ``"vit_tiny_patch16_224.augreg_in21k"``;
    3. torchvision: ``"shufflenet_v2_x1_0"``, or ``"torchvision.models.resnet18"`` where timm has the name too. Its stem
       is replaced where ``in_channels`` is not three;
    4. the import path of a class or function: ``"my_package.nets.MyNet"``. It gets ``in_channels`` and ``num_classes``
       where its signature names them or takes any keyword. It is imported and called: a path from an untrusted file
       runs untrusted code.

    Args:
        name: Name of the network.
        in_channels: Channels of an image.
        num_classes: Number of classes.
        arguments: Further arguments of the network, e.g. ``pretrained=True`` for timm.

    Returns:
        The network: images ``(N, in_channels, H, W)`` -> logits ``(N, num_classes)``.

    Raises:
        ValueError: If nobody knows the name (close names are listed), a path cannot be imported, or a number is not
            positive.
        MisconfigurationException: If torchvision's pre-trained weights are asked for with other than three channels.

    Example:
        >>> type(create_network("resnet20", in_channels=1)).__name__
        'ThinResNet'
        >>> create_network("SmallCNN", in_channels=1, widths=(8, 8)).classifier
        Linear(in_features=8, out_features=10, bias=True)

    """
    check_sizes(in_channels, num_classes)
    if name in _OWN:
        return _OWN[name](in_channels=in_channels, num_classes=num_classes, **arguments)

    import timm

    if timm.is_model(name):
        return timm.create_model(name, in_chans=in_channels, num_classes=num_classes, **arguments)

    import torchvision

    of_torchvision = torchvision.models.list_models(module=torchvision.models)
    if (short := name.removeprefix("torchvision.models.")) in of_torchvision:
        return _torchvision_network(short, in_channels, num_classes, arguments)
    if "." in name:
        return _network_at(name, in_channels, num_classes, arguments)
    known = {*_OWN, *timm.list_models(), *of_torchvision}
    raise ValueError(
        "Expected argument `network` to be a network of lightning_trust.nn, timm or torchvision, or the import path of"
        f" one, but got {name!r}.{_suggestion(name, known)}"
    )


def _suggestion(name: str, known: set[str]) -> str:
    by_lower = {candidate.lower(): candidate for candidate in sorted(known)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=5)
    return f" Did you mean one of {[by_lower[match] for match in close]}?" if close else ""


def _torchvision_network(name: str, in_channels: int, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    import torchvision

    if in_channels != 3 and arguments.get("weights") is not None:
        raise MisconfigurationException(
            f"torchvision's pre-trained weights of '{name}' are for three channels, but got in_channels={in_channels}."
            " Take the network of timm, which converts them, or repeat the channel in the data."
        )
    network = torchvision.models.get_model(name, num_classes=num_classes, **arguments)
    if in_channels != 3:
        path, stem = next(
            (path, module)
            for path, module in network.named_modules()
            if isinstance(module, nn.Conv2d) and module.in_channels == 3
        )
        new = nn.Conv2d(
            in_channels,
            stem.out_channels,
            stem.kernel_size,  # type: ignore[arg-type]
            stride=stem.stride,  # type: ignore[arg-type]
            padding=stem.padding,  # type: ignore[arg-type]
            bias=stem.bias is not None,
        )
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        parent, _, attribute = path.rpartition(".")
        setattr(network.get_submodule(parent), attribute, new)
    return network


def _network_at(path: str, in_channels: int, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    module_path, _, attribute = path.rpartition(".")
    try:
        build = getattr(importlib.import_module(module_path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected argument `network` to be a network's name or import path, but got {path!r}, which cannot be"
            f" imported: {error}."
        ) from error
    parameters = inspect.signature(build).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    sizes = {"in_channels": in_channels, "num_classes": num_classes}
    network = build(**{key: value for key, value in sizes.items() if takes_any or key in parameters}, **arguments)
    if not isinstance(network, nn.Module):
        raise ValueError(f"Expected {path!r} to build a torch.nn.Module, but got {type(network).__name__}.")
    return network
