"""Prompting: complete recipes."""

from lightning_trust.modules.prompting.visual_prompt_classifier import VisualPromptClassifier

__all__ = ["VisualPromptClassifier"]
