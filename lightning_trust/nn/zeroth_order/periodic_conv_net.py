"""A network of values on a periodic grid."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class PeriodicConvNet(nn.Module):
    r"""A correction of values on a periodic grid by what flows between neighbours: convolutions with ReLU between them.

    .. math:: y_i = q_i - q_{i-1}, \qquad q = \mathrm{conv}(\mathrm{ReLU}(\cdots \mathrm{conv}(x)))

    so that the sum over the cells is zero: what corrects a solver of a conservation law keeps what is conserved. At the
    start the last layer is zero, and there is no correction.

    Shape:
        - Input: ``(B, n)``, values of a state on ``n`` cells.
        - Output: ``(B, n)``.

    Args:
        channels: Channels between the convolutions.
        layers: Number of convolutions, at least 2.
        kernel_size: Cells that a convolution sees, an odd number.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> network = PeriodicConvNet(channels=8)
        >>> sum(parameter.numel() for parameter in network.parameters())
        89
        >>> network(torch.randn(2, 32)).abs().max()
        tensor(0., grad_fn=<MaxBackward1>)

    """

    def __init__(self, channels: int = 8, layers: int = 2, kernel_size: int = 5) -> None:
        super().__init__()
        for name, value, least in (("channels", channels, 1), ("layers", layers, 2), ("kernel_size", kernel_size, 1)):
            if value < least:
                raise ValueError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"Expected argument `kernel_size` to be odd, but got {kernel_size}.")
        widths = [1, *[channels] * (layers - 1), 1]
        convolutions = [
            nn.Conv1d(taken, given, kernel_size, padding=kernel_size // 2, padding_mode="circular")
            for taken, given in pairwise(widths)
        ]
        for parameter in convolutions[-1].parameters():
            nn.init.zeros_(parameter)
        between = [part for convolution in convolutions[:-1] for part in (convolution, nn.ReLU())]
        self.layers = nn.Sequential(*between, convolutions[-1])

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n)`` -> ``(B, n)``."""
        flux: Tensor = self.layers(x.unsqueeze(1)).squeeze(1)
        return flux - flux.roll(1, dims=-1)
