"""Zeroth-order training: estimators of gradients, and optimizers that take no other gradient."""

from lightning_trust.optim.zeroth_order.cge import CGE
from lightning_trust.optim.zeroth_order.estimator import GradientEstimator
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle
from lightning_trust.optim.zeroth_order.rge import RGE

__all__ = ["CGE", "RGE", "Estimate", "GradientEstimator", "LossOracle"]
