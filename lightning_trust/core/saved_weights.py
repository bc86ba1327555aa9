"""Weights in files, and whether they fit a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_trust.core.host import plain_name


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The state dict of a Lightning checkpoint, of a file with a state dict, or of a safetensors file, on the CPU.

    Args:
        file: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no state dict that loads as weights only.

    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of weights, but '{file}' does not exist.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"Expected {path} to be a whole safetensors file, but got: {error}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"Expected {path} to be a checkpoint that loads as weights only, but got: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state:
        found = "an empty dict" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"Expected {path} to hold a state dict of tensors, but got {found}.")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"Expected {path} to hold a state dict of tensors, but got a dict with entries that are no tensors:"
            f" {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}."
        )
    return state


def fitting_weights(
    found: Mapping[str, Tensor], module: nn.Module, source: str | Path, inside: bool = False
) -> dict[str, Tensor]:
    """The entries of a state dict by the plain names of a module.

    Args:
        found: The state dict, with or without the names that ``torch.compile`` puts in between.
        module: Whose weights they shall be.
        source: Where they come from, for the error.
        inside: Whether they may be those of a module that holds such a module, as a checkpoint of a host does.

    Raises:
        ValueError: If they are of another architecture: missing and unexpected names and differing shapes are listed.

    """
    own = {plain_name(name): value for name, value in module.state_dict().items()}
    mine = {plain_name(name): value for name, value in found.items()}
    first = next(iter(own), "")
    if inside and not all(name in mine for name in own):
        prefixes = [name.removesuffix(first) for name in mine if name.endswith(f".{first}")]
        prefix = next((prefix for prefix in prefixes if all(prefix + name in mine for name in own)), "")
        # beside the module, others of its holder may stand
        mine = {name.removeprefix(prefix): value for name, value in mine.items() if name.startswith(prefix)}
    shapes = [
        f"{name} ({tuple(mine[name].shape)} instead of {tuple(own[name].shape)})"
        for name in own
        if name in mine and mine[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in (
            ("missing", [name for name in own if name not in mine]),
            ("unexpected", [name for name in mine if name not in own]),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"Expected {source} to hold the weights of {type(module).__name__}, but got another architecture:"
            f" {'; '.join(problems)}."
        )
    return mine


@torch.no_grad()
def load_weights(module: nn.Module, file: str | Path, inside: bool = False) -> None:
    """Load the weights of a file into a module with the same names and shapes.

    Args:
        module: The module.
        file: A Lightning checkpoint, a file with a state dict, or a safetensors file.
        inside: Whether they may be those of a module that holds such a module, as a checkpoint of a host does.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no weights or those of another architecture.

    """
    found = fitting_weights(read_weights(file), module, file, inside)
    for name, value in module.state_dict().items():
        value.copy_(found[plain_name(name)])
