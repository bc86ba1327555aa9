"""Pruning."""

from lightning_trust.callbacks.pruning.one_shot_pruning import OneShotPruning

__all__ = ["OneShotPruning"]
