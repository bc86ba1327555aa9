"""What attaches to any Trainer."""

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
    "ExactResume",
    "FineTune",
    "L1Sparse",
    "LoadWeights",
    "OneShotPruning",
    "RandomLabel",
    "SalUn",
    "UnlearningReport",
    "WeightSaliency",
]
