"""How large the images of a visual prompt are, as the run goes on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.core.wrapping import surrounding
from lightning_trust.nn.prompting.frame_prompt import LearnableScale
from lightning_trust.nn.prompting.visual_prompt import VisualPrompt


class ScaleMonitor(pl.Callback):
    """Log the scale of a :class:`~lightning_trust.nn.LearnableScale` once an epoch, as ``trust/vp_scale``.

    From "AutoVP: An Automated Visual Prompting Framework and Benchmark" (ICLR 2024). A scale at its lower bound leaves
    little but prompt; one above ``out_size / image_size`` crops the image.

    Raises:
        MisconfigurationException: If the run has no visual prompt with a scale.

    Example:
        >>> import torch
        >>> from lightning_trust.nn import FramePrompt
        >>> ScaleMonitor.scale_of(FramePrompt(LearnableScale(8, 12, channels=1, init=0.5))).item()
        0.5

    """

    @staticmethod
    def scale_of(prompt: Any) -> Any:
        """The scale of a prompt, a scalar tensor; None if it has none."""
        return next((part.scale for part in prompt.modules() if isinstance(part, LearnableScale)), None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a run that has no scale."""
        if self._scale(trainer, pl_module) is None:
            raise MisconfigurationException(
                f"{type(self).__name__} found no LearnableScale in the visual prompt of this run. Use it with a"
                " FramePrompt, or leave it out."
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log it."""
        # ranks agree: they took the same steps
        pl_module.log("trust/vp_scale", self._scale(trainer, pl_module).detach().clone())

    def _scale(self, trainer: Any, host: Any) -> Any:
        found = surrounding(trainer, host, VisualPrompt)
        return None if found is None else self.scale_of(found[0])
