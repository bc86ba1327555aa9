"""MLP: its size, its chain of blocks, and how it is made by name."""

from __future__ import annotations

import pytest
import torch

from lightning_trust.core.blocks import split
from lightning_trust.nn import MLP, create_network


@pytest.mark.parametrize(("widths", "parameters"), [((16,), 1210), ((), 650), ((8, 4), 64 * 8 + 8 + 36 + 50)])
def test_size_and_chain(widths, parameters):
    network = create_network("MLP", in_channels=1, num_classes=10, image_size=8, widths=widths)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    x = y = torch.randn(3, 1, 8, 8)
    for block in split(network):
        y = block(y)
    assert torch.equal(y, network(x))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"image_size": 0}, "`image_size` to be a positive integer, but got 0"), ({"widths": (4, 0)}, "`widths`")],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        MLP(**arguments)
