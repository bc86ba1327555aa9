"""Layers in tensor-train form against dense ones and tltorch."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trust.functional.zeroth_order import largest_ranks
from lightning_trust.nn import SineMLP, TTLinear, tensorize

HJB = {"0": ((1, 1, 3, 7), (8, 4, 4, 4)), "1": ((4, 4, 4, 8), (8, 4, 4, 4))}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("format", ["ttm", "tt"])
@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_layer_is_its_dense_twin(format, rows):
    layer = TTLinear(36, 24, (2, 3, 6), (4, 3, 2), rank=3, format=format).double()
    dense = layer.to_dense()
    x = torch.randn(rows, 36, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, dense.weight, layer.bias), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x.view(1, rows, 36)), dense(x)[None], rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.float()(x.float()), dense(x).float(), rtol=1e-6, atol=1e-5)


def test_format_tt_has_a_core_a_mode():
    layer = TTLinear(12, 10, (3, 4), (2, 5), rank=(2, 3, 2), format="tt", bias=False).double()
    assert [tuple(core.shape) for core in layer.cores] == [(1, 2, 2), (2, 5, 3), (3, 3, 2), (2, 4, 1)]
    # outputs' modes before inputs', summed over all bonds
    weight = torch.einsum("aib,bjc,ckd,dle->ijkl", *layer.cores).reshape(10, 12)
    torch.testing.assert_close(layer.to_dense().weight, weight)
    assert TTLinear(6, 10, (6,), (2, 5), rank=1, format="tt")(torch.ones(1, 6)).shape == (1, 10)


@pytest.mark.parametrize("format", ["ttm", "tt"])
def test_from_dense_of_full_rank_is_the_dense_layer(format):
    dense = nn.Linear(24, 12).double()
    out_shape, in_shape = (3, 2, 2), (2, 3, 4)
    modes = (out_shape, in_shape) if format == "ttm" else ((*out_shape, 1, 1, 1), (1, 1, 1, *in_shape))
    layer = TTLinear.from_dense(dense, largest_ranks(*modes), in_shape, out_shape, format)
    assert layer.cores[0].dtype == torch.float64
    torch.testing.assert_close(layer.to_dense().weight, dense.weight, rtol=0, atol=1e-12)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))


def test_from_dense_gets_nearer_with_the_rank():
    dense = nn.Linear(64, 64)
    ranks = (1, 4, (8, 16, 8), (8, 64, 8))
    errors = [(TTLinear.from_dense(dense, rank).to_dense().weight - dense.weight).norm().item() for rank in ranks]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


def test_counts_of_the_paper():
    network = tensorize(SineMLP(21, 512, 3, 1), rank=2, shapes=HJB)
    assert (count(SineMLP(21, 512, 3, 1)), count(network)) == (274_433, 1_929)
    assert sum(layer.num_parameters for layer in network.modules() if isinstance(layer, TTLinear)) == 1_929 - 513
    mnist = nn.Sequential(nn.Linear(784, 256, bias=False), nn.ReLU(), nn.Linear(256, 10, bias=False))
    shapes = {"0": ((4, 7, 7, 4), (4, 4, 4, 4)), "2": ((4, 4, 4, 4), (1, 5, 2, 1))}
    assert (count(mnist), count(tensorize(mnist, rank=4, shapes=shapes))) == (203_264, 1_504)


@pytest.mark.parametrize("name", ["0", "1"])
def test_tltorch_with_the_same_cores(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tltorch = pytest.importorskip("tltorch")
        in_shape, out_shape = HJB[name]
        peer = tltorch.FactorizedLinear(in_shape, out_shape, bias=True, factorization="blocktt", rank=2)
    layer = TTLinear(peer.in_features.item(), 512, in_shape, out_shape, rank=2).double()
    peer = peer.double()
    with torch.no_grad():
        for theirs, mine in zip(peer.weight.factors, layer.cores, strict=True):
            theirs.copy_(mine)
        peer.bias.copy_(layer.bias)
    x = torch.randn(6, layer.in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peer(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.to_dense().weight, peer.weight.to_matrix().detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("format", ["ttm", "tt"])
def test_weights_start_with_the_variance_of_a_dense_layer(format):
    layer = TTLinear(256, 256, (4, 4, 4, 4), (4, 4, 4, 4), rank=4, format=format, bias=False)
    squares = []
    for _ in range(200):
        layer.reset_parameters()
        squares.append(layer.to_dense().weight.square().mean())
    # an entry is a sum of products: heavy tails, so a mean over many draws
    assert torch.stack(squares).mean().item() == pytest.approx(1 / 256, rel=0.25)


def test_gradients_are_those_of_the_dense_weight():
    layer = TTLinear(12, 6, (3, 4), (2, 3), rank=2).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    layer(x).square().sum().backward()
    weight = layer.to_dense().weight.detach()
    # d loss / d W = 2 (x W^T + b)^T x, and a core's part of it by the chain rule
    outer = 2 * (x @ weight.T + layer.bias.detach()).T @ x
    outer = outer.reshape(2, 3, 3, 4)
    expected = torch.einsum("ipjq,bpq->ijb", outer, layer.cores[1].detach()[..., 0])[None]
    torch.testing.assert_close(layer.cores[0].grad, expected)


def test_pickles_and_copies():
    layer = TTLinear(12, 6, (3, 4), (2, 3))
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 12)
    assert torch.equal(layer(x), twin(x))
    assert list(layer.state_dict()) == ["bias", "cores.0", "cores.1"]


class TestTensorize:
    def test_network_that_came_in_is_unchanged(self):
        network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        before = copy.deepcopy(network.state_dict())
        converted = tensorize(network, rank=2)
        assert [type(layer) for layer in converted] == [TTLinear, nn.ReLU, nn.Linear]
        assert type(network[0]) is nn.Linear
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert torch.equal(converted[2].weight, network[2].weight)

    def test_keeps_weights_type_and_mode(self):
        network = nn.Sequential(nn.Linear(16, 16)).double().eval()
        converted = tensorize(network, rank=16, min_params=1, shapes={"0": ((4, 4), (4, 4))}, keep_weights=True)
        x = torch.randn(3, 16, dtype=torch.float64)
        torch.testing.assert_close(converted(x), network(x))
        assert not converted[0].training

    def test_module_that_is_a_linear_layer(self):
        assert isinstance(tensorize(nn.Linear(64, 64)), TTLinear)

    def test_layer_used_twice_is_converted_once(self):
        layer = nn.Linear(64, 64)
        converted = tensorize(nn.Sequential(layer, nn.Tanh(), layer))
        assert converted[0] is converted[2]
        assert isinstance(converted[0], TTLinear)

    def test_shared_weight_stays_dense(self):
        network = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        network[2].weight = network[0].weight
        converted = tensorize(network)
        assert [type(layer) for layer in converted] == [nn.Embedding, TTLinear, nn.Linear]
        assert converted[2].weight is converted[0].weight
        with pytest.raises(ValueError, match="Cannot convert layer '2': another module shares its weight."):
            tensorize(network, shapes={"2": ((8, 8), (8, 8))})

    def test_layer_that_would_not_get_smaller_stays_dense(self):
        network = nn.Sequential(nn.Linear(256, 256), nn.Linear(31, 37))
        assert [type(layer) for layer in tensorize(network, rank=20)] == [TTLinear, nn.Linear]

    @pytest.mark.parametrize("features", [(97, 101), (60, 84), (512, 21), (768, 3072)])
    def test_shapes_are_found_for_any_features(self, features):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            converted = tensorize(nn.Linear(*features), rank=1, min_params=1)
        assert converted(torch.zeros(2, features[0])).shape == (2, features[1])

    def test_multihead_attention_still_works(self):
        # its output layer is a subclass of nn.Linear whose weight is read, and never called
        layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True)
        converted = tensorize(layer, rank=2)
        assert isinstance(converted.linear1, TTLinear)
        assert not isinstance(converted.self_attn.out_proj, TTLinear)
        assert converted(torch.zeros(2, 3, 64)).shape == (2, 3, 64)

    def test_nothing_to_do(self):
        with pytest.raises(ValueError, match=r"nothing to tensorize in Sequential \(1 linear layers\)"):
            tensorize(nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match=r"Expected argument `shapes` to name layers of \['0'\], but got '1'."):
            tensorize(nn.Sequential(nn.Linear(64, 64)), shapes={"1": ((8, 8), (8, 8))})
        with pytest.raises(ValueError, match="Expected argument `rank` to be a positive integer, but got 0."):
            tensorize(nn.Linear(64, 64), rank=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_shape": (3, 3)}, r"`in_shape` .* product is in_features=12, but got \(3, 3\), whose product is 9."),
        ({"out_shape": (7,)}, r"`out_shape` .* product is out_features=6, but got \(7,\), whose product is 7."),
        ({"in_shape": (-3, -4)}, "Expected argument `in_shape` to be positive integers"),
        ({"in_shape": (3, 2, 2)}, r"the same length under format='ttm', but got \(3, 2, 2\) and \(2, 3\)."),
        ({"rank": 0}, "Expected argument `rank` to be positive, but got 0."),
        ({"rank": (2, 2)}, r"Expected argument `rank` to hold 1 ranks, one a bond, but got \(2, 2\)."),
        ({"format": "cp"}, r"Expected argument `format` to be one of \['ttm', 'tt'\], but got 'cp'."),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"in_features": 12, "out_features": 6, "in_shape": (3, 4), "out_shape": (2, 3), **change}
    with pytest.raises(ValueError, match=message):
        TTLinear(**arguments)


def test_rank_that_is_too_large_is_lowered_with_a_warning():
    with pytest.warns(UserWarning, match=r"Argument `rank` is 50, but the ranks .* are at most \(6,\): larger"):
        layer = TTLinear(12, 6, (3, 4), (2, 3), rank=50)
    assert layer.ranks == (6,)
