"""A run's prompt as two small files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_trust.core.wrapping import surrounding
from lightning_trust.nn.prompting.saved_prompt import save_prompt
from lightning_trust.nn.prompting.visual_prompt import VisualPrompt


class SavePrompt(Callback):
    """Write the prompt of a run when training ends, for :func:`lightning_trust.nn.load_prompt`.

    Args:
        folder: Folder of ``prompt.safetensors`` and ``prompt.json``; within the Trainer's ``default_root_dir`` where it
            is no absolute path.
        class_names: Names of the classes of the task; those of the datamodule, where it has ``class_names``, if None.
        source_names: Names of the network's classes; those of a ``Backbone`` by themselves.

    Raises:
        MisconfigurationException: If the run has no visual prompt.

    Example:
        >>> SavePrompt("prompt").folder
        'prompt'

    """

    def __init__(
        self,
        folder: str = "prompt",
        class_names: Sequence[str] | None = None,
        source_names: Sequence[str] | None = None,
    ) -> None:
        self.folder = folder
        self.class_names = class_names
        self.source_names = source_names

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a run that has nothing to save."""
        if surrounding(trainer, pl_module, VisualPrompt) is None:
            raise MisconfigurationException(
                f"{type(self).__name__} found no visual prompt: neither a VisualPrompting callback nor a"
                " VisualPromptClassifier."
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write it, on the first rank."""
        found = surrounding(trainer, pl_module, VisualPrompt)
        if found is None or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        part, network = found
        names = self.class_names or getattr(trainer.datamodule, "class_names", None)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics = {name: value for name, value in logged.items() if math.isfinite(value)}
        save_prompt(Path(trainer.default_root_dir) / self.folder, part, network, names, self.source_names, metrics)  # type: ignore[arg-type]
