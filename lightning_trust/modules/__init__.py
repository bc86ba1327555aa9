"""LightningModules: complete recipes of one run."""

from __future__ import annotations

from lightning_trust.modules.image_classifier import ImageClassifier
from lightning_trust.modules.language import CausalLanguageModel
from lightning_trust.modules.multi_label_classifier import MultiLabelClassifier
from lightning_trust.modules.prompting import (
    ContrastivePretraining,
    TransferClassifier,
    VisualPromptClassifier,
)
from lightning_trust.modules.zeroth_order import PINNModule, SKSModule, SolverCorrection

__all__ = [
    "CausalLanguageModel",
    "ContrastivePretraining",
    "ImageClassifier",
    "MultiLabelClassifier",
    "PINNModule",
    "SKSModule",
    "SolverCorrection",
    "TransferClassifier",
    "VisualPromptClassifier",
]
