"""A trained prompt as two small files, and a frozen network with it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_trust.core.files import read_json, read_tensors, write_json, write_tensors
from lightning_trust.core.wrapping import Surrounded, checksum
from lightning_trust.nn.prompting.backbones import Backbone
from lightning_trust.nn.prompting.prompts import Prompt
from lightning_trust.nn.prompting.visual_prompt import VisualPrompt

KIND = "lightning_trust.prompt"
_VERSION = 1
_TENSORS = "prompt.safetensors"
CARD = "prompt.json"


def save_prompt(
    folder: str | Path,
    part: VisualPrompt,
    network: nn.Module,
    class_names: Sequence[str] | None = None,
    source_names: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write what visual prompting learned, and what it is for.

    ``prompt.safetensors`` holds the prompt where its mask is (nothing else of it counts) and the mapping;
    ``prompt.json`` holds the network's name and SHA-256, its input space where it is known, how prompt and mapping are
    built, the names of the classes, and for CLIP the templates. It takes little more than the prompt's own bytes.

    Args:
        folder: Folder of the two files.
        part: Prompt and mapping, ``VisualPrompting.part``.
        network: The frozen network that they were trained for.
        class_names: Names of the classes of the task.
        source_names: Names of the network's classes; those of a ``Backbone`` by themselves.
        metrics: What was measured of it, such as its accuracy in validation.

    Returns:
        The folder.

    Raises:
        MisconfigurationException: If prompt or mapping cannot be built again from their arguments.

    Example:
        >>> import tempfile, torch
        >>> from lightning_trust.nn import AdditivePrompt, LabelMapping
        >>> network = nn.Linear(4, 3)
        >>> part = VisualPrompt(AdditivePrompt((4,)), LabelMapping(3, 2, "identity"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_prompt(folder, part, network, class_names=["no", "yes"])
        ...     load_prompt(folder, network)(torch.zeros(1, 4)).shape
        torch.Size([1, 2])

    """
    folder = Path(folder)
    modules = {"prompt": part.prompt, "mapping": part.mapping}
    for role, module in modules.items():
        if module is not None and not hasattr(module, "hparams"):
            raise MisconfigurationException(
                f"save_prompt writes how the {role} is built, but {type(module).__name__} does not tell its arguments."
                " Use one of lightning_trust.nn, or derive from lightning's HyperparametersMixin and call"
                " `save_hyperparameters()`."
            )
    if source_names is None and isinstance(network, Backbone):
        source_names = network.source_names
    card: dict[str, Any] = {
        "network": {
            "name": network.spec.name if isinstance(network, Backbone) else type(network).__name__,
            "sha256": _sha256(network),
            "spec": network.spec.as_dict() if isinstance(network, Backbone) else None,
        },
        "class_names": None if class_names is None else list(class_names),
        "metrics": dict(metrics or {}),
        **{role: None if module is None else _built(module) for role, module in modules.items()},
    }
    indices = getattr(part.mapping, "indices", None)
    if source_names is not None and class_names is not None and isinstance(indices, Tensor):
        card["meaning"] = {
            name: [source_names[place] for place in some]
            for name, some in zip(class_names, indices.tolist(), strict=True)
        }
        if isinstance(card["network"]["spec"], dict):
            # the names that are used stand above; a thousand others would outweigh the prompt
            card["network"]["spec"]["class_names"] = None
    write_tensors(folder / _TENSORS, KIND, _VERSION, _packed(part))
    write_json(folder / CARD, KIND, _VERSION, card)
    return folder


def load_prompt(folder: str | Path, network: nn.Module) -> Surrounded:
    """The frozen network with a prompt that :func:`save_prompt` wrote.

    Args:
        folder: Folder of the two files.
        network: The network that the prompt was trained for, with the same weights; it is frozen.

    Returns:
        A module from inputs of the prompt to logits of the task, in eval mode. ``card`` is what the file says.

    Raises:
        ValueError: If the prompt was trained for other weights.
        FileNotFoundError: If a file is missing.

    """
    part, card = read_prompt(folder)
    found = _sha256(network)
    if found != card["network"]["sha256"]:
        raise ValueError(
            f"Expected argument `network` to be the {card['network']['name']} that the prompt in {folder} was trained"
            f" for, with weights of SHA-256 {card['network']['sha256'][:12]}..., but got a"
            f" {network.spec.name if isinstance(network, Backbone) else type(network).__name__} of {found[:12]}...."
        )
    surrounded = Surrounded(network, part).eval()
    surrounded.card = card
    return surrounded


def read_prompt(folder: str | Path) -> tuple[VisualPrompt, dict[str, Any]]:
    """What :func:`save_prompt` wrote, without the network: prompt and mapping, and what the card says.

    Args:
        folder: Folder of the two files.

    Raises:
        ValueError: If a file is damaged or names a module that is not of lightning_trust.nn.
        FileNotFoundError: If a file is missing.

    """
    folder = Path(folder)
    card = read_json(folder / CARD, KIND, _VERSION)
    prompt, mapping = (None if card[role] is None else _rebuilt(card[role]) for role in ("prompt", "mapping"))
    assert prompt is not None  # noqa: S101  (save_prompt wrote it)
    part = VisualPrompt(prompt, mapping)
    tensors, _ = read_tensors(folder / _TENSORS, KIND, _VERSION)
    for name, module in part.named_modules():
        if isinstance(module, Prompt):
            key = f"{name}.delta"
            whole = module.delta.data.new_zeros(module.delta.shape)
            whole[module.mask.bool()] = tensors[key]
            tensors[key] = whole
    part.load_state_dict(tensors)
    return part, card


def _packed(part: VisualPrompt) -> dict[str, Tensor]:
    tensors = dict(part.state_dict())
    for name, module in part.named_modules():
        if isinstance(module, Prompt):
            tensors[f"{name}.delta"] = module.delta.detach()[module.mask.bool()]
    return tensors


def _sha256(network: nn.Module) -> str:
    return network.sha256() if isinstance(network, Backbone) else checksum(network)


def _built(module: nn.Module) -> dict[str, Any]:
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in module.hparams.items()}  # type: ignore[operator, union-attr]
    for name in inspect.signature(type(module)).parameters:
        part = getattr(module, name, None)
        if name not in arguments and isinstance(part, nn.Module):
            arguments[name] = _built(part)
    return {"class": type(module).__name__, "arguments": arguments}


def _rebuilt(built: dict[str, Any]) -> nn.Module:
    from lightning_trust import nn as room

    kind = getattr(room, built["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(
            f"Expected the prompt's file to name a module of lightning_trust.nn, but got {built['class']!r}."
        )
    arguments = {
        name: _rebuilt(value) if isinstance(value, dict) and "class" in value else value
        for name, value in built["arguments"].items()
    }
    return kind(**arguments)
