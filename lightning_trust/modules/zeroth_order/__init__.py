"""LightningModules of zeroth-order training."""

from __future__ import annotations

from lightning_trust.modules.zeroth_order.pinn import PINNModule
from lightning_trust.modules.zeroth_order.sks_module import SKSModule
from lightning_trust.modules.zeroth_order.solver_correction import SolverCorrection

__all__ = [
    "PINNModule",
    "SKSModule",
    "SolverCorrection",
]
