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
from lightning_trust.nn.language import LoRA, create_causal_network, find_adapter, with_lora
from lightning_trust.nn.mlp import MLP
from lightning_trust.nn.networks import create_network
from lightning_trust.nn.resnet import ThinResNet, resnet18_small, resnet20
from lightning_trust.nn.small_cnn import SmallCNN
from lightning_trust.nn.zeroth_order import (
    AutogradDerivatives,
    BlackBoxLayer,
    BlackBoxStatistics,
    DerivativeEstimator,
    FiniteDifference,
    MuSuggestion,
    Simulator,
    SimulatorAnswerError,
    SimulatorAnswers,
    SimulatorCounts,
    SimulatorError,
    SineMLP,
    SparseGridDerivatives,
    SteinDerivatives,
    TTLinear,
    suggest_mu,
    tensorize,
)

__all__ = [
    "MLP",
    "AutogradDerivatives",
    "BlackBoxLayer",
    "BlackBoxStatistics",
    "CurveNetwork",
    "DerivativeEstimator",
    "FiniteDifference",
    "LoRA",
    "MoEConv2d",
    "MoENetwork",
    "MuSuggestion",
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
    "SparseGridDerivatives",
    "SteinDerivatives",
    "TTLinear",
    "ThinResNet",
    "WeightEnsemble",
    "convert_to_moe",
    "count_multiply_adds",
    "create_causal_network",
    "create_network",
    "find_adapter",
    "moe_resnet18",
    "moe_small_cnn",
    "resnet18_small",
    "resnet20",
    "straight_through_top1",
    "suggest_mu",
    "tensorize",
    "with_lora",
]
