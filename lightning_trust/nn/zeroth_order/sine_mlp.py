"""A network of coordinates."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Sine(nn.Module):
    """The sine of every entry."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return torch.sin(x)


class SineMLP(nn.Sequential):
    r"""Linear layers with sines between them, the network of physics-informed training.

    .. math:: N(x) = W_L \sin(W_{L-1} \cdots \sin(W_1 x + b_1) \cdots + b_{L-1}) + b_L

    Its linear layers are named ``"0"``, ``"1"``, ... without gaps, for :func:`tensorize`.

    Paper: Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks (arXiv 2308.09858).

    Shape:
        - Input: ``(..., in_features)``.
        - Output: ``(..., out_features)``.

    Args:
        in_features: Number of coordinates, time included.
        hidden: Width between the layers.
        layers: Number of linear layers, at least 1.
        out_features: Number of outputs.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> network = SineMLP(21, 512, 3, 1)
        >>> sum(parameter.numel() for parameter in network.parameters())
        274433
        >>> [name for name, layer in network.named_children() if isinstance(layer, nn.Linear)]
        ['0', '1', '2']

    """

    def __init__(self, in_features: int, hidden: int = 512, layers: int = 3, out_features: int = 1) -> None:
        sizes = {"in_features": in_features, "hidden": hidden, "layers": layers, "out_features": out_features}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        widths = [in_features, *[hidden] * (layers - 1), out_features]
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for k in range(layers):
            parts[str(k)] = nn.Linear(widths[k], widths[k + 1])
            if k < layers - 1:
                parts[f"sine{k}"] = Sine()
        super().__init__(parts)
