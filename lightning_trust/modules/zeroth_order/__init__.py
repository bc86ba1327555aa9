"""LightningModules of zeroth-order training."""

from __future__ import annotations

from lightning_trust.modules.zeroth_order.pinn import PINNModule

__all__ = ["PINNModule"]
