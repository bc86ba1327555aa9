"""Layers and networks."""

from __future__ import annotations

from lightning_trust.nn.networks import create_network
from lightning_trust.nn.resnet import ThinResNet, resnet18_small, resnet20
from lightning_trust.nn.small_cnn import SmallCNN

__all__ = ["SmallCNN", "ThinResNet", "create_network", "resnet18_small", "resnet20"]
