"""A network as a chain of blocks, whose composition is its forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class SplitModule(Protocol):
    r"""A network that tells which modules its forward pass is a chain of.

    ``network(x)`` must equal ``b_L(...b_2(b_1(x)))`` for the modules :math:`b_1, \dots, b_L` that :meth:`blocks`
    returns, each of which takes and returns one tensor whose first dimension is that of the samples. Together they hold
    all parameters of the network, each in one block.
    """

    def blocks(self) -> Sequence[nn.Module]:
        """The modules, in the order in which they are run."""
        ...


def split(network: nn.Module) -> list[nn.Module] | None:
    """The blocks of a network, or None where it is not known to be a chain of some.

    Known are ``nn.Sequential``, the ResNets of torchvision, and every :class:`SplitModule`; a block that is
    known to be a chain itself is split further.

    Args:
        network: The network.

    Example:
        >>> inner = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> [type(block).__name__ for block in split(nn.Sequential(inner, nn.Linear(2, 1)))]
        ['Linear', 'Tanh', 'Linear']
        >>> split(nn.Linear(2, 1)) is None
        True

    """
    if isinstance(network, SplitModule):
        chain = list(network.blocks())
    elif type(network) is nn.Sequential:
        chain = list(network)
    else:
        found = _resnet(network)
        if found is None:
            return None
        chain = found
    blocks: list[nn.Module] = []
    for block in chain:
        blocks.extend(split(block) or [block])
    inside = [id(parameter) for block in blocks for parameter in block.parameters()]
    whole = {id(parameter) for parameter in network.parameters()}
    # a parameter that is in two blocks, or in none, moves more, or less, than what comes after one block
    return blocks if len(inside) == len(set(inside)) and set(inside) == whole else None


def _resnet(network: nn.Module) -> list[nn.Module] | None:
    from torchvision.models import ResNet

    if type(network) is not ResNet:
        return None
    parts: dict[str, Any] = dict(network.named_children())
    stem = [parts[name] for name in ("conv1", "bn1", "relu", "maxpool")]
    body = [block for name in ("layer1", "layer2", "layer3", "layer4") for block in parts[name]]
    return [*stem, *body, parts["avgpool"], nn.Flatten(1), parts["fc"]]


class GlobalMean(nn.Module):
    """Mean over height and width: ``(N, C, H, W)`` -> ``(N, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Images to one value a channel."""
        return x.mean(dim=(2, 3))
