"""Prompting: complete recipes."""

from lightning_trust.modules.prompting.contrastive_pretraining import ContrastivePretraining
from lightning_trust.modules.prompting.transfer_classifier import (
    TransferClassifier,
)
from lightning_trust.modules.prompting.visual_prompt_classifier import VisualPromptClassifier

__all__ = [
    "ContrastivePretraining",
    "TransferClassifier",
    "VisualPromptClassifier",
]
