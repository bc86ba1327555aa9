"""Optimizers, and estimators of gradients."""

from __future__ import annotations

from lightning_trust.optim.lamb import LAMB
from lightning_trust.optim.lars import LARS
from lightning_trust.optim.zeroth_order import (
    CGE,
    RGE,
    ZOSGD,
    ZOSVRG,
    Estimate,
    ForwardGradient,
    GradientEstimator,
    HybridZO,
    LossOracle,
    MeZO,
    PatternSearch,
    SignSCD,
    ZerothOrderOptimizer,
    ZOAdam,
    ZOConservative,
    ZOSignSGD,
)

__all__ = [
    "CGE",
    "LAMB",
    "LARS",
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
