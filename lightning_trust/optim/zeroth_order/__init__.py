"""Zeroth-order training: estimators of gradients, and optimizers that take no other gradient."""

from lightning_trust.optim.zeroth_order.cge import CGE
from lightning_trust.optim.zeroth_order.estimator import GradientEstimator
from lightning_trust.optim.zeroth_order.forward_gradient import ForwardGradient
from lightning_trust.optim.zeroth_order.hybrid_zo import HybridZO
from lightning_trust.optim.zeroth_order.mezo import MeZO
from lightning_trust.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle
from lightning_trust.optim.zeroth_order.pattern_search import PatternSearch
from lightning_trust.optim.zeroth_order.rge import RGE
from lightning_trust.optim.zeroth_order.sign_scd import SignSCD
from lightning_trust.optim.zeroth_order.zo_adam import ZOAdam
from lightning_trust.optim.zeroth_order.zo_conservative import ZOConservative
from lightning_trust.optim.zeroth_order.zo_sgd import ZOSGD
from lightning_trust.optim.zeroth_order.zo_sign_sgd import ZOSignSGD
from lightning_trust.optim.zeroth_order.zo_svrg import ZOSVRG

__all__ = [
    "CGE",
    "RGE",
    "ZOSGD",
    "ZOSVRG",
    "Estimate",
    "ForwardGradient",
    "GradientEstimator",
    "HybridZO",
    "LossOracle",
    "MeZO",
    "PatternSearch",
    "SignSCD",
    "ZOAdam",
    "ZOConservative",
    "ZOSignSGD",
    "ZerothOrderOptimizer",
]
