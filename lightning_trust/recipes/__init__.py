"""Methods and experiments of several runs, whose finished stages are recorded and skipped."""

from __future__ import annotations

from lightning_trust.recipes.prompting import AutoVPTuner, VPConfig, VPSearchSpace
from lightning_trust.recipes.stages import Recipe, Stage

__all__ = ["AutoVPTuner", "Recipe", "Stage", "VPConfig", "VPSearchSpace"]
