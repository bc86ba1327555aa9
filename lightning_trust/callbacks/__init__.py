"""What attaches to any Trainer."""

from lightning_trust.callbacks.adversarial import (
    AWP,
    MART,
    TRADES,
    AdversarialTraining,
    AdvMoE,
    AverageOf,
    CleanAndAdversarial,
    CurveEvaluation,
    ExtremeNormTraining,
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
from lightning_trust.callbacks.zeroth_order import ZerothOrderGradient

__all__ = [
    "AWP",
    "MART",
    "TRADES",
    "AdvMoE",
    "AdversarialTraining",
    "AverageOf",
    "CleanAndAdversarial",
    "CurveEvaluation",
    "ExactResume",
    "ExtremeNormTraining",
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
    "ZerothOrderGradient",
]
