"""Prompting: a frozen network reused by learning its input and its output map."""

from lightning_trust.functional.prompting.conflict_free_gradient import conflict_free_gradient
from lightning_trust.functional.prompting.label_mapping import (
    check_enough_sources,
    count_predictions,
    frequency_label_mapping,
    mapping_precision,
    semantic_label_mapping,
)
from lightning_trust.functional.prompting.simplex_projection import project_to_simplex

__all__ = [
    "check_enough_sources",
    "conflict_free_gradient",
    "count_predictions",
    "frequency_label_mapping",
    "mapping_precision",
    "project_to_simplex",
    "semantic_label_mapping",
]
