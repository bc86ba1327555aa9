import pytest
import torch
from torch import nn

from lightning_trust.nn import SmallCNN


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_number_of_parameters_by_hand():
    convolutions = 9 * (1 * 16 + 16 * 32 + 32 * 32 + 32 * 64)
    assert count(SmallCNN()) == convolutions + 2 * (16 + 32 + 32 + 64) + 64 * 10 + 10 == 33_338
    assert count(SmallCNN(batch_norm=False)) == convolutions + (16 + 32 + 32 + 64) + 64 * 10 + 10


@pytest.mark.parametrize("pixels", [1, 8, 28, 32])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_any_size_of_image_gives_logits(pixels, in_channels):
    network = SmallCNN(in_channels, num_classes=7, widths=(4, 6))
    assert network(torch.rand(2, in_channels, pixels, pixels)).shape == (2, 7)


def test_equals_the_layers_written_out():
    network = SmallCNN(widths=(4, 6)).eval()
    conv1, norm1, _, _, conv2, norm2, _, _ = network.features
    with torch.no_grad():
        for norm in (norm1, norm2):
            norm.running_mean.uniform_()
            norm.running_var.uniform_(0.5, 2.0)
    x = torch.rand(3, 1, 9, 9)
    h = x
    for conv, norm in ((conv1, norm1), (conv2, norm2)):
        h = nn.functional.conv2d(h, conv.weight, padding=1)
        h = (h - norm.running_mean.view(1, -1, 1, 1)) / (norm.running_var.view(1, -1, 1, 1) + norm.eps).sqrt()
        h = nn.functional.max_pool2d(h.clamp(min=0), 2, ceil_mode=True)
    expected = h.mean(dim=(2, 3)) @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "Expected argument `in_channels` to be a positive integer, but got 0."),
        ({"num_classes": 0}, "Expected argument `num_classes` to be a positive integer, but got 0."),
        ({"widths": ()}, r"Expected argument `widths` to be one or more positive integers, but got \(\)."),
        ({"widths": (8, 0)}, r"Expected argument `widths` .* but got \(8, 0\)."),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SmallCNN(**arguments)
