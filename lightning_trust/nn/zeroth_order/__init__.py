"""Layers for zeroth-order training: black boxes inside a network."""

from __future__ import annotations

from lightning_trust.nn.zeroth_order.black_box import BlackBoxLayer, BlackBoxStatistics
from lightning_trust.nn.zeroth_order.derivatives import (
    AutogradDerivatives,
    DerivativeEstimator,
    FiniteDifference,
    SparseGridDerivatives,
    SteinDerivatives,
)
from lightning_trust.nn.zeroth_order.periodic_conv_net import PeriodicConvNet
from lightning_trust.nn.zeroth_order.simulator import Simulator, SimulatorAnswers
from lightning_trust.nn.zeroth_order.simulator_attempts import SimulatorAnswerError, SimulatorCounts, SimulatorError
from lightning_trust.nn.zeroth_order.sine_mlp import SineMLP
from lightning_trust.nn.zeroth_order.suggest_mu import MuSuggestion, suggest_mu
from lightning_trust.nn.zeroth_order.tt_linear import TTLinear, tensorize

__all__ = [
    "AutogradDerivatives",
    "BlackBoxLayer",
    "BlackBoxStatistics",
    "DerivativeEstimator",
    "FiniteDifference",
    "MuSuggestion",
    "PeriodicConvNet",
    "Simulator",
    "SimulatorAnswerError",
    "SimulatorAnswers",
    "SimulatorCounts",
    "SimulatorError",
    "SineMLP",
    "SparseGridDerivatives",
    "SteinDerivatives",
    "TTLinear",
    "suggest_mu",
    "tensorize",
]
