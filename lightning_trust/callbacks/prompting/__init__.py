"""Prompting: callbacks that learn what goes into a frozen network and what comes out of it."""

from lightning_trust.callbacks.prompting.adversarial_debiasing import AdversarialDebiasing
from lightning_trust.callbacks.prompting.adversarial_prompting import AdversarialPrompting
from lightning_trust.callbacks.prompting.fairness_evaluation import FairnessEvaluation
from lightning_trust.callbacks.prompting.fairness_reprogramming import FairnessReprogramming
from lightning_trust.callbacks.prompting.iterative_label_mapping import IterativeLabelMapping
from lightning_trust.callbacks.prompting.save_prompt import SavePrompt
from lightning_trust.callbacks.prompting.scale_monitor import ScaleMonitor
from lightning_trust.callbacks.prompting.source_pruning import (
    SourcePruning,
)
from lightning_trust.callbacks.prompting.visual_prompting import VisualPrompting

__all__ = [
    "AdversarialDebiasing",
    "AdversarialPrompting",
    "FairnessEvaluation",
    "FairnessReprogramming",
    "IterativeLabelMapping",
    "SavePrompt",
    "ScaleMonitor",
    "SourcePruning",
    "VisualPrompting",
]
