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
from lightning_trust.callbacks.language import SaveAdapter
from lightning_trust.callbacks.load_weights import LoadWeights
from lightning_trust.callbacks.prompting import (
    IterativeLabelMapping,
    SourcePruning,
    VisualPrompting,
)
from lightning_trust.callbacks.pruning import OneShotPruning
from lightning_trust.callbacks.unlearning import (
    FineTune,
    L1Sparse,
    RandomLabel,
    SalUn,
    UnlearningReport,
    WeightSaliency,
)
from lightning_trust.callbacks.zeroth_order import (
    DynamicSparseGradient,
    KnowledgeLoss,
    SKSQueryMonitor,
    ZerothOrderGradient,
)

__all__ = [
    "AWP",
    "MART",
    "TRADES",
    "AdvMoE",
    "AdversarialTraining",
    "AverageOf",
    "CleanAndAdversarial",
    "CurveEvaluation",
    "DynamicSparseGradient",
    "ExactResume",
    "ExtremeNormTraining",
    "FastAT",
    "FastBAT",
    "FineTune",
    "FreeAdversarialTraining",
    "GradAlign",
    "IterativeLabelMapping",
    "KnowledgeLoss",
    "L1Sparse",
    "LoadWeights",
    "OODEvaluation",
    "Objective",
    "OneShotPruning",
    "QuantizedAllReduce",
    "RandomLabel",
    "RobustEvaluation",
    "RobustModeConnectivity",
    "SKSQueryMonitor",
    "SalUn",
    "SaliencyGuidedAdversarialTraining",
    "SaveAdapter",
    "SourcePruning",
    "StandardAT",
    "UnlearningReport",
    "VisualPrompting",
    "WeightSaliency",
    "ZerothOrderGradient",
]
