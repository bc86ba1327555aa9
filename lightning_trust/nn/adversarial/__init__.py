"""Adversarial robustness."""

from lightning_trust.nn.adversarial.convert import convert_to_moe, count_multiply_adds, moe_resnet18
from lightning_trust.nn.adversarial.moe import MoEConv2d, MoENetwork, Routing, RoutingContext, straight_through_top1
from lightning_trust.nn.adversarial.router import Router

__all__ = [
    "MoEConv2d",
    "MoENetwork",
    "Router",
    "Routing",
    "RoutingContext",
    "convert_to_moe",
    "count_multiply_adds",
    "moe_resnet18",
    "straight_through_top1",
]
