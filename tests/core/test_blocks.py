"""Networks as chains of blocks: which are known, and that a chain is the network."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from lightning_trust.core.blocks import GlobalMean, SplitModule, split
from lightning_trust.nn import MLP, SmallCNN, resnet18_small, resnet20


@pytest.mark.parametrize(
    ("make", "channels", "size"),
    [
        (lambda: SmallCNN(), 1, 28),
        (lambda: resnet20(in_channels=1), 1, 28),
        (lambda: resnet20(in_channels=1, shortcut="B"), 1, 28),
        (lambda: resnet18_small(), 3, 28),
        (lambda: torchvision.models.resnet18(num_classes=3), 3, 64),
        (lambda: MLP(image_size=8), 1, 8),
        (lambda: nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), nn.ReLU(), nn.Linear(4, 2)), 1, 4),
    ],
    ids=["small_cnn", "resnet20_a", "resnet20_b", "resnet18_small", "torchvision", "mlp", "nested"],
)
def test_a_chain_is_the_network(make, channels, size):
    network = make().eval()
    blocks = split(network)
    assert len(blocks) > 2
    assert not any(type(block) is nn.Sequential for block in blocks)
    x = y = torch.randn(2, channels, size, size)
    for block in blocks:
        y = block(y)
    torch.testing.assert_close(y, network(x))


def test_what_is_no_chain():
    shared = nn.Linear(3, 3)
    assert split(nn.Linear(3, 3)) is None
    assert split(nn.Sequential(shared, nn.ReLU(), shared)) is None

    class Scaled(nn.Sequential):
        """Does more than its children."""

        def forward(self, x):
            return 2.0 * super().forward(x)

    assert split(Scaled(nn.Linear(3, 3))) is None

    class Forgets(MLP):
        def blocks(self):
            return super().blocks()[:-1]

    assert isinstance(Forgets(), SplitModule)
    assert split(Forgets()) is None


def test_mean_over_pixels():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(GlobalMean()(x), x.flatten(2).mean(dim=2))
