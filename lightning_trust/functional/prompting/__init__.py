"""Prompting: a frozen network reused by learning its input and its output map."""

from lightning_trust.functional.prompting.conflict_free_gradient import conflict_free_gradient
from lightning_trust.functional.prompting.simplex_projection import project_to_simplex

__all__ = ["conflict_free_gradient", "project_to_simplex"]
