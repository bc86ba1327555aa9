"""Optimizers and learning rate schedules."""

from __future__ import annotations

from lightning_trust.optim.lamb import LAMB
from lightning_trust.optim.lars import LARS

__all__ = ["LAMB", "LARS"]
