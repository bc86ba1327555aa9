"""LightningModules: complete recipes of one run."""

from __future__ import annotations

from lightning_trust.modules.image_classifier import ImageClassifier

__all__ = ["ImageClassifier"]
