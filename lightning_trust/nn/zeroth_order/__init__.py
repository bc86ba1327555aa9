"""Layers for zeroth-order training: black boxes inside a network."""

from __future__ import annotations

from lightning_trust.nn.zeroth_order.simulator import Simulator, SimulatorAnswers
from lightning_trust.nn.zeroth_order.simulator_attempts import SimulatorAnswerError, SimulatorCounts, SimulatorError
from lightning_trust.nn.zeroth_order.sine_mlp import SineMLP
from lightning_trust.nn.zeroth_order.tt_linear import TTLinear, tensorize

__all__ = [
    "Simulator",
    "SimulatorAnswerError",
    "SimulatorAnswers",
    "SimulatorCounts",
    "SimulatorError",
    "SineMLP",
    "TTLinear",
    "tensorize",
]
