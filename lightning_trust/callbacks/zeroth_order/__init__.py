"""Zeroth-order training: gradients from forward passes only."""

from lightning_trust.callbacks.zeroth_order.deepzero import DynamicSparseGradient
from lightning_trust.callbacks.zeroth_order.knowledge_loss import KnowledgeLoss
from lightning_trust.callbacks.zeroth_order.sks_query_monitor import SKSQueryMonitor
from lightning_trust.callbacks.zeroth_order.zeroth_order_gradient import ZerothOrderGradient

__all__ = [
    "DynamicSparseGradient",
    "KnowledgeLoss",
    "SKSQueryMonitor",
    "ZerothOrderGradient",
]
