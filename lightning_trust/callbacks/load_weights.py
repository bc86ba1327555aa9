"""Start a run from the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_trust.core.host import plain_name
from lightning_trust.core.step import Attachment, BuildPhase, HostCallback


class LoadWeights(HostCallback):
    """Load the weights of a checkpoint when the host is built: weights only, no optimizer and no progress.

    It comes before any callback that wraps the network, and before a checkpoint that the run is resumed from, which
    wins.

    Args:
        checkpoint: A Lightning checkpoint, a file with a state dict, or a safetensors file.
        name: Tells two callbacks of this class apart.

    Raises:
        FileNotFoundError: If there is no such file when the fit starts.
        ValueError: If the file is no checkpoint, or of another architecture (missing and unexpected names and
            differing shapes are listed).

    Example:
        >>> LoadWeights("runs/trained/last.ckpt").checkpoint
        'runs/trained/last.ckpt'

    """

    def __init__(self, checkpoint: str, name: str | None = None) -> None:
        super().__init__(name=name)
        self.checkpoint = str(checkpoint)

    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Load once the host has built its network."""
        if not Path(self.checkpoint).is_file():
            raise FileNotFoundError(
                f"Expected argument `checkpoint` of LoadWeights to be a file, but got '{self.checkpoint}', which"
                " does not exist."
            )
        attachment.when_built(self, host, BuildPhase.LOAD, self._load)

    def _load(self, host: nn.Module) -> None:
        load_weights(host, self.checkpoint)


def load_weights(host: nn.Module, checkpoint: str | Path) -> None:
    """Load the weights of a checkpoint into a module with the same names and shapes.

    Args:
        host: The module.
        checkpoint: A Lightning checkpoint, a file with a state dict, or a safetensors file.

    Raises:
        ValueError: If the file is no checkpoint or of another architecture.

    """
    found = {plain_name(name): value for name, value in _read(Path(checkpoint)).items()}
    own = {plain_name(name): value for name, value in host.state_dict().items()}
    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    shapes = [
        f"{name} ({tuple(found[name].shape)} instead of {tuple(own[name].shape)})"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        problems = [
            f"{len(names)} {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise ValueError(
            f"Expected {checkpoint} to hold the weights of {type(host).__name__}, but got another architecture:"
            f" {'; '.join(problems)}."
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(found[name])


def _read(path: Path) -> dict[str, Any]:
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
    others = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"Expected {path} to hold a state dict of tensors, but got a dict with entries that are no tensors:"
            f" {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}."
        )
    return state
