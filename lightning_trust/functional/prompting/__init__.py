"""Prompting: a frozen network reused by learning its input and its output map."""

from lightning_trust.functional.prompting.class_wise_loss import (
    class_mean_sum,
    class_wise_cross_entropy,
    class_wise_interrelation,
)
from lightning_trust.functional.prompting.conflict_free_gradient import conflict_free_gradient
from lightning_trust.functional.prompting.label_mapping import (
    check_enough_sources,
    count_predictions,
    frequency_label_mapping,
    mapping_precision,
    semantic_label_mapping,
)
from lightning_trust.functional.prompting.simplex_projection import project_to_simplex
from lightning_trust.functional.prompting.source_scores import (
    feature_mapping_scores,
    grad_norm_scores,
    group_means,
    label_mapping_scores,
    linear_grad_norms,
    moderate_rows,
    rank_groups,
)

__all__ = [
    "check_enough_sources",
    "class_mean_sum",
    "class_wise_cross_entropy",
    "class_wise_interrelation",
    "conflict_free_gradient",
    "count_predictions",
    "feature_mapping_scores",
    "frequency_label_mapping",
    "grad_norm_scores",
    "group_means",
    "label_mapping_scores",
    "linear_grad_norms",
    "mapping_precision",
    "moderate_rows",
    "project_to_simplex",
    "rank_groups",
    "semantic_label_mapping",
]
