"""The router of a network of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from lightning_trust.nn.small_cnn import check_sizes

RouterNorm = Literal["batch", "group"]


class Router(nn.Module):
    r"""A small residual network that scores the experts for each image.

    Its stem halves the image, for what it spends is taken from what the experts save: with the default widths it needs
    2.6 million multiply-adds for an image of 28 pixels, 0.6 % of a ResNet-18. The paper's router is a ResNet-20:
    ``widths=(16, 32, 64)``, ``blocks=(3, 3, 3)``, ``stem_stride=1``.

    With BatchNorm, as in the paper, it learns in far fewer steps. In training its scores then depend on the batch;
    :class:`~lightning_trust.callbacks.AdvMoE` holds it in eval mode while the pathways train, so that they meet the
    images that they get in use. Normalised in groups, scores of an image never depend on others, and no buffer moves.

    Paper: Robust Mixture-of-Expert Training for Convolutional Neural Networks (ICCV 2023).

    Shape:
        - Input: images :math:`(N, C, H, W)`.
        - Output: scores :math:`(N, E)`.

    Args:
        num_experts: Number of experts ``E``.
        in_channels: Channels of an image.
        widths: Channels of the stages; each but the first halves the image.
        blocks: Residual blocks of each stage.
        stem_stride: Stride of the first convolution.
        norm: ``"batch"`` or ``"group"`` (of up to eight groups; with eight channels each is alone).

    Raises:
        ValueError: If a number is not positive, ``widths`` and ``blocks`` differ in length, or there is no such
            ``norm``; in the call, if an image has other channels.

    Example:
        >>> import torch
        >>> router = Router(num_experts=2, in_channels=1)
        >>> router(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 2])
        >>> sum(parameter.numel() for parameter in router.parameters())
        77234

    """

    def __init__(
        self,
        num_experts: int = 2,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (1, 1, 1),
        stem_stride: int = 2,
        norm: RouterNorm = "batch",
    ) -> None:
        super().__init__()
        check_sizes(in_channels, 1)
        if num_experts < 1:
            raise ValueError(f"Expected argument `num_experts` to be a positive integer, but got {num_experts}.")
        if stem_stride < 1:
            raise ValueError(f"Expected argument `stem_stride` to be a positive integer, but got {stem_stride}.")
        if not widths or len(widths) != len(blocks) or min(*widths, *blocks) < 1:
            raise ValueError(
                "Expected arguments `widths` and `blocks` to be equally many positive integers, but got"
                f" {tuple(widths)} and {tuple(blocks)}."
            )
        if norm not in get_args(RouterNorm):
            raise ValueError(f"Expected argument `norm` to be 'batch' or 'group', but got {norm!r}.")
        make = nn.BatchNorm2d if norm == "batch" else _group_norm
        self.in_channels = in_channels
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], 3, stride=stem_stride, padding=1, bias=False),
            make(widths[0]),
            nn.ReLU(inplace=True),
        ]
        before = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                stride = 2 if stage and not block else 1
                join = None
                if stride != 1 or before != width:
                    join = nn.Sequential(nn.Conv2d(before, width, 1, stride=stride, bias=False), make(width))
                layers.append(BasicBlock(before, width, stride, join, norm_layer=make))
                before = width
        self.features = nn.Sequential(*layers)
        self.scores = nn.Linear(before, num_experts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> scores ``(N, E)``."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"Expected images of shape (N, {self.in_channels}, H, W), the router's `in_channels`, but got"
                f" {tuple(x.shape)}."
            )
        return self.scores(self.features(x).mean(dim=(2, 3)))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)
