"""Layers for zeroth-order training: black boxes inside a network."""

from __future__ import annotations

from lightning_trust.nn.zeroth_order.simulator import Simulator, SimulatorAnswers
from lightning_trust.nn.zeroth_order.simulator_attempts import SimulatorAnswerError, SimulatorCounts, SimulatorError

__all__ = [
    "Simulator",
    "SimulatorAnswerError",
    "SimulatorAnswers",
    "SimulatorCounts",
    "SimulatorError",
]
