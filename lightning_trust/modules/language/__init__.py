"""Recipes for language models."""

from __future__ import annotations

from lightning_trust.modules.language.causal_language_model import CausalLanguageModel

__all__ = ["CausalLanguageModel"]
