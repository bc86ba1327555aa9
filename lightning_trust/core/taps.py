"""Reading what passes through a named part of a host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def captured_outputs(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what a module puts out in every call inside, with its graph, in the order of the calls.

    Args:
        module: The module, such as the network of a host.

    Example:
        >>> import torch
        >>> layer = nn.Identity()
        >>> with captured_outputs(layer) as outputs:
        ...     total = layer(torch.ones(2)).sum()
        >>> outputs
        [tensor([1., 1.])]

    """
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
