import pytest
import torch
from torch import nn

from lightning_trust.nn import SineMLP


def test_network_is_sines_between_linear_layers():
    network = SineMLP(3, 8, 3, 2)
    x = torch.randn(5, 3)
    first, second, third = (layer for layer in network if isinstance(layer, nn.Linear))
    expected = third(torch.sin(second(torch.sin(first(x)))))
    assert torch.equal(network(x), expected)
    assert expected.shape == (5, 2)
    assert [name for name in network.state_dict() if name.endswith("weight")] == ["0.weight", "1.weight", "2.weight"]


def test_one_layer_is_linear():
    network = SineMLP(3, 8, layers=1)
    assert [type(layer) for layer in network] == [nn.Linear]


@pytest.mark.parametrize("name", ["in_features", "hidden", "layers", "out_features"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"Expected argument `{name}` to be a positive integer, but got 0."):
        SineMLP(**{"in_features": 2, name: 0})
