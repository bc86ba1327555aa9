"""A multilayer perceptron for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_trust.nn.small_cnn import check_sizes


class MLP(nn.Module):
    r"""Linear layers with ReLU between them, over the pixels of an image.

    With the default widths and a one-channel image of 8 pixels that is 1,210 parameters.

    Shape:
        - Input: :math:`(N, C, H, W)` with ``C = in_channels`` and ``H = W = image_size``.
        - Output: logits :math:`(N, K)` with ``K = num_classes``.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes.
        image_size: Height and width of an image.
        widths: Units of each hidden layer; none for a linear classifier.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> import torch
        >>> network = MLP(in_channels=1, num_classes=10, image_size=8)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in network.parameters())
        1210

    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: int = 8, widths: Sequence[int] = (16,)
    ) -> None:
        super().__init__()
        check_sizes(in_channels, num_classes)
        if image_size < 1:
            raise ValueError(f"Expected argument `image_size` to be a positive integer, but got {image_size}.")
        if not all(width > 0 for width in widths):
            raise ValueError(f"Expected argument `widths` to be positive integers, but got {widths}.")
        layers: list[nn.Module] = [nn.Flatten(1)]
        before = in_channels * image_size**2
        for width in widths:
            layers += [nn.Linear(before, width), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(*layers, nn.Linear(before, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> logits ``(N, K)``."""
        return self.layers(x)

    def blocks(self) -> list[nn.Module]:
        """The layers that the network is a chain of."""
        return list(self.layers)
