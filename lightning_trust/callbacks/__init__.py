"""What attaches to any Trainer."""

from lightning_trust.callbacks.adversarial import (
    AWP,
    MART,
    TRADES,
    AdversarialTraining,
    AdvMoE,
    CleanAndAdversarial,
    CurveEvaluation,
    FastAT,
    FastBAT,
    FreeAdversarialTraining,
    GradAlign,
    Objective,
    OODEvaluation,
    QuantizedAllReduce,
    RobustEvaluation,
    RobustModeConnectivity,
    SaliencyGuidedAdversarialTraining,
    StandardAT,
)
from lightning_trust.callbacks.exact_resume import ExactResume
from lightning_trust.callbacks.load_weights import LoadWeights
from lightning_trust.callbacks.pruning import OneShotPruning
from lightning_trust.callbacks.unlearning import (
    FineTune,
    L1Sparse,
    RandomLabel,
    SalUn,
    UnlearningReport,
    WeightSaliency,
)

__all__ = [
    "AWP",
    "MART",
    "TRADES",
    "AdvMoE",
    "AdversarialTraining",
    "CleanAndAdversarial",
    "CurveEvaluation",
    "ExactResume",
    "FastAT",
    "FastBAT",
    "FineTune",
    "FreeAdversarialTraining",
    "GradAlign",
    "L1Sparse",
    "LoadWeights",
    "OODEvaluation",
    "Objective",
    "OneShotPruning",
    "QuantizedAllReduce",
    "RandomLabel",
    "RobustEvaluation",
    "RobustModeConnectivity",
    "SalUn",
    "SaliencyGuidedAdversarialTraining",
    "StandardAT",
    "UnlearningReport",
    "WeightSaliency",
]
