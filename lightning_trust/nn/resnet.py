"""Residual networks for images of about 28 to 32 pixels."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from lightning_trust.core.blocks import GlobalMean
from lightning_trust.nn.small_cnn import check_sizes


def resnet18_small(in_channels: int = 3, num_classes: int = 10) -> ResNet:
    """ResNet-18 with a 3x3 stem of stride 1 and no max-pooling, for images of about 28 to 32 pixels.

    "Deep Residual Learning for Image Recognition", arXiv:1512.03385. The network of torchvision, whose stem (7x7,
    stride 2, then max-pooling) would leave one pixel in sixteen of so small an image; parameter names are
    torchvision's. The usual ResNet-18 of CIFAR experiments: 11,173,962 parameters for three channels and ten classes.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes.

    Returns:
        The network: images ``(N, in_channels, H, W)`` -> logits ``(N, num_classes)``.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> import torch
        >>> network = resnet18_small(in_channels=1)
        >>> network.layer1(network.conv1(torch.zeros(1, 1, 28, 28)).relu()).shape
        torch.Size([1, 64, 28, 28])

    """
    check_sizes(in_channels, num_classes)
    network = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def resnet20(in_channels: int = 3, num_classes: int = 10, shortcut: Literal["A", "B"] = "A") -> ThinResNet:
    """ResNet-20 of the paper's CIFAR-10 experiments: three stages of three blocks, 16, 32 and 64 channels.

    "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes.
        shortcut: What joins two stages. ``"A"``, the paper's: every second pixel, new channels filled with zeros,
            no parameters (269,722 parameters for three channels and ten classes). ``"B"``: a 1x1 convolution of
            stride 2 with batch normalisation (272,474), as many repositories have it.

    Returns:
        The network: images ``(N, in_channels, H, W)`` -> logits ``(N, num_classes)``.

    Raises:
        ValueError: If a number is not positive or ``shortcut`` is neither ``"A"`` nor ``"B"``.

    Example:
        >>> for shortcut in ("A", "B"):
        ...     print(sum(parameter.numel() for parameter in resnet20(shortcut=shortcut).parameters()))
        269722
        272474

    """
    return ThinResNet(blocks=3, in_channels=in_channels, num_classes=num_classes, shortcut=shortcut)


class ThinResNet(nn.Module):
    """The residual network of arXiv:1512.03385, section 4.2, with ``6 * blocks + 2`` layers.

    Shape:
        - Input: images ``(N, in_channels, H, W)``.
        - Output: logits ``(N, num_classes)``.

    Args:
        blocks: Residual blocks per stage: 3 for ResNet-20, 9 for ResNet-56.
        in_channels: Channels of an image.
        num_classes: Number of classes.
        shortcut: ``"A"`` (zero-filled channels) or ``"B"`` (1x1 convolution), see :func:`resnet20`.

    Raises:
        ValueError: If a number is not positive or ``shortcut`` is neither ``"A"`` nor ``"B"``.

    Example:
        >>> import torch
        >>> ThinResNet(blocks=1, in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    """

    def __init__(
        self, blocks: int = 3, in_channels: int = 3, num_classes: int = 10, shortcut: Literal["A", "B"] = "A"
    ) -> None:
        super().__init__()
        check_sizes(in_channels, num_classes)
        if blocks < 1:
            raise ValueError(f"Expected argument `blocks` to be a positive integer, but got {blocks}.")
        if shortcut not in ("A", "B"):
            raise ValueError(f"Expected argument `shortcut` to be 'A' or 'B', but got {shortcut!r}.")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, shortcut)
        self.layer2 = _stage(16, 32, blocks, shortcut)
        self.layer3 = _stage(32, 64, blocks, shortcut)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> logits ``(N, K)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))

    def blocks(self) -> list[nn.Module]:
        """The layers and residual blocks that the network is a chain of."""
        stages = (self.layer1, self.layer2, self.layer3)
        body = [block for stage in stages for block in stage]
        return [self.conv1, self.bn1, nn.ReLU(), *body, GlobalMean(), self.fc]


class _ZeroFill(nn.Module):
    """Every second pixel, the new channels filled with zeros."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


def _stage(before: int, after: int, blocks: int, shortcut: Literal["A", "B"]) -> nn.Sequential:
    stride = 1 if before == after else 2
    join: nn.Module | None = None
    if before != after:
        join = (
            _ZeroFill(after - before)
            if shortcut == "A"
            else nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
        )
    first = BasicBlock(before, after, stride, downsample=join)
    return nn.Sequential(first, *(BasicBlock(after, after) for _ in range(blocks - 1)))
