"""What a Trainer is given where nothing but the training itself is wanted."""

from __future__ import annotations

from typing import Any

#: of ``lightning.pytorch.Trainer``: no files, no output
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
