"""Adversarial robustness."""

from lightning_trust.callbacks.adversarial.adversarial_training import AdversarialTraining
from lightning_trust.callbacks.adversarial.advmoe import AdvMoE
from lightning_trust.callbacks.adversarial.awp import AWP
from lightning_trust.callbacks.adversarial.curve_evaluation import CurveEvaluation
from lightning_trust.callbacks.adversarial.dat import QuantizedAllReduce
from lightning_trust.callbacks.adversarial.free_adversarial_training import FreeAdversarialTraining
from lightning_trust.callbacks.adversarial.objectives import (
    MART,
    TRADES,
    CleanAndAdversarial,
    FastAT,
    FastBAT,
    GradAlign,
    Objective,
    StandardAT,
)
from lightning_trust.callbacks.adversarial.ood_evaluation import OODEvaluation
from lightning_trust.callbacks.adversarial.robust_evaluation import RobustEvaluation
from lightning_trust.callbacks.adversarial.robust_mode_connectivity import RobustModeConnectivity
from lightning_trust.callbacks.adversarial.saliency_guided_adversarial_training import (
    SaliencyGuidedAdversarialTraining,
)
from lightning_trust.callbacks.adversarial.several_norms import AverageOf, ExtremeNormTraining

__all__ = [
    "AWP",
    "MART",
    "TRADES",
    "AdvMoE",
    "AdversarialTraining",
    "AverageOf",
    "CleanAndAdversarial",
    "CurveEvaluation",
    "ExtremeNormTraining",
    "FastAT",
    "FastBAT",
    "FreeAdversarialTraining",
    "GradAlign",
    "OODEvaluation",
    "Objective",
    "QuantizedAllReduce",
    "RobustEvaluation",
    "RobustModeConnectivity",
    "SaliencyGuidedAdversarialTraining",
    "StandardAT",
]
