"""Machine unlearning."""

from lightning_trust.callbacks.unlearning.fine_tune import FineTune
from lightning_trust.callbacks.unlearning.l1_sparse import L1Sparse
from lightning_trust.callbacks.unlearning.random_label import RandomLabel
from lightning_trust.callbacks.unlearning.salun import SalUn
from lightning_trust.callbacks.unlearning.unlearning_report import UnlearningReport
from lightning_trust.callbacks.unlearning.weight_saliency import WeightSaliency

__all__ = ["FineTune", "L1Sparse", "RandomLabel", "SalUn", "UnlearningReport", "WeightSaliency"]
