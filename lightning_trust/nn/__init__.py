"""Layers and networks."""

from __future__ import annotations

from lightning_trust.nn.adversarial import (
    CurveNetwork,
    MoEConv2d,
    MoENetwork,
    Router,
    Routing,
    RoutingContext,
    WeightEnsemble,
    convert_to_moe,
    count_multiply_adds,
    moe_resnet18,
    moe_small_cnn,
    straight_through_top1,
)
from lightning_trust.nn.networks import create_network
from lightning_trust.nn.resnet import ThinResNet, resnet18_small, resnet20
from lightning_trust.nn.small_cnn import SmallCNN
from lightning_trust.nn.zeroth_order import (
    Simulator,
    SimulatorAnswerError,
    SimulatorAnswers,
    SimulatorCounts,
    SimulatorError,
    SineMLP,
    TTLinear,
    tensorize,
)

__all__ = [
    "CurveNetwork",
    "MoEConv2d",
    "MoENetwork",
    "Router",
    "Routing",
    "RoutingContext",
    "Simulator",
    "SimulatorAnswerError",
    "SimulatorAnswers",
    "SimulatorCounts",
    "SimulatorError",
    "SineMLP",
    "SmallCNN",
    "TTLinear",
    "ThinResNet",
    "WeightEnsemble",
    "convert_to_moe",
    "count_multiply_adds",
    "create_network",
    "moe_resnet18",
    "moe_small_cnn",
    "resnet18_small",
    "resnet20",
    "straight_through_top1",
    "tensorize",
]
