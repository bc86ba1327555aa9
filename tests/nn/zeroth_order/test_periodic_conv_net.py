"""A network on a periodic grid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_trust.nn import PeriodicConvNet


def moved(network):
    """One whose last layer is no longer zero."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return network


def test_it_starts_at_zero_and_learns_from_there():
    network, x = PeriodicConvNet(channels=4, layers=3), torch.randn(2, 16)
    assert not network(x).any()
    (network(x) - torch.randn(2, 16)).square().mean().backward()
    assert network.layers[-1].weight.grad.abs().max() > 0.0


def test_what_it_gives_sums_to_zero():
    found = moved(PeriodicConvNet(channels=4, layers=3)).double()(torch.randn(5, 16).double())
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found.sum(dim=1), torch.zeros(5).double(), rtol=0.0, atol=1e-12)


def test_it_knows_no_place_on_the_grid():
    network, x = moved(PeriodicConvNet(channels=4, layers=3, kernel_size=3)).double(), torch.randn(2, 16).double()
    torch.testing.assert_close(network(x.roll(5, dims=1)), network(x).roll(5, dims=1), rtol=0.0, atol=1e-12)
    # a cell reaches one cell on each side in each of three layers, and what flows out of a cell flows into the next
    reached = (network(x + nn.functional.one_hot(torch.tensor(0), 16)) - network(x)).abs().sum(dim=0) > 0.0
    assert reached.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 13, 14, 15]


def test_layers():
    convolutions = [part for part in PeriodicConvNet(channels=3, layers=4).layers if isinstance(part, nn.Conv1d)]
    assert [(part.in_channels, part.out_channels) for part in convolutions] == [(1, 3), (3, 3), (3, 3), (3, 1)]


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("channels", 0, "`channels` to be at least 1, but got 0"),
        ("layers", 1, "`layers` to be at least 2, but got 1"),
        ("kernel_size", 4, "`kernel_size` to be odd, but got 4"),
    ],
)
def test_bad_input(argument, value, words):
    with pytest.raises(ValueError, match=words):
        PeriodicConvNet(**{argument: value})
