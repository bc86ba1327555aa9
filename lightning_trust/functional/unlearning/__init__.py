"""Machine unlearning: labels, coefficients and the membership attack."""

from lightning_trust.functional.unlearning.l1_sparse import l1_coefficient
from lightning_trust.functional.unlearning.membership_inference import membership_feature, membership_inference
from lightning_trust.functional.unlearning.random_label import random_labels

__all__ = ["l1_coefficient", "membership_feature", "membership_inference", "random_labels"]
