"""Recipes of prompting: the search for a configuration."""

from __future__ import annotations

from lightning_trust.recipes.prompting.autovp import AutoVPTuner
from lightning_trust.recipes.prompting.vp_config import VPConfig
from lightning_trust.recipes.prompting.vp_search_space import VPSearchSpace

__all__ = ["AutoVPTuner", "VPConfig", "VPSearchSpace"]
