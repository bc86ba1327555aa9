"""Methods and experiments of several runs, whose finished stages are recorded and skipped."""

from __future__ import annotations

from lightning_trust.recipes.stages import Recipe, Stage

__all__ = ["Recipe", "Stage"]
