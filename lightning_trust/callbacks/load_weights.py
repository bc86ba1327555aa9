"""Start a run from the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lightning_trust.core.saved_weights import load_weights
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
