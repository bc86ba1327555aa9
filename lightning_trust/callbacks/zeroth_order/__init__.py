"""Zeroth-order training: gradients from forward passes only."""

from lightning_trust.callbacks.zeroth_order.zeroth_order_gradient import ZerothOrderGradient

__all__ = ["ZerothOrderGradient"]
