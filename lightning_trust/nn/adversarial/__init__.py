"""Adversarial robustness."""

from lightning_trust.nn.adversarial.convert import (
    convert_to_moe,
    count_multiply_adds,
    moe_resnet18,
    moe_small_cnn,
)
from lightning_trust.nn.adversarial.curve import CurveNetwork
from lightning_trust.nn.adversarial.ensemble import WeightEnsemble
from lightning_trust.nn.adversarial.moe import MoEConv2d, MoENetwork, Routing, RoutingContext, straight_through_top1
from lightning_trust.nn.adversarial.router import Router

__all__ = [
    "CurveNetwork",
    "MoEConv2d",
    "MoENetwork",
    "Router",
    "Routing",
    "RoutingContext",
    "WeightEnsemble",
    "convert_to_moe",
    "count_multiply_adds",
    "moe_resnet18",
    "moe_small_cnn",
    "straight_through_top1",
]
