"""CurveNetwork: ends bit for bit, the straight segment, gradients of bends, names, real architectures, bad input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations

from lightning_trust.attacks import PGD
from lightning_trust.functional.adversarial import curve_coefficients
from lightning_trust.modules import ImageClassifier
from lightning_trust.nn import CurveNetwork, SmallCNN


def network(seed: int) -> nn.Module:
    """A network with BatchNorm whose statistics are no defaults."""
    torch.manual_seed(seed)
    net = SmallCNN(widths=(4, 6))
    for _ in range(2):
        net(images())
    return net


def images(rows: int = 6) -> torch.Tensor:
    return torch.rand(rows, 1, 9, 9, generator=torch.Generator().manual_seed(5))


def curve_between(first: nn.Module, last: nn.Module, **arguments) -> CurveNetwork:
    curve = CurveNetwork(copy.deepcopy(first), **arguments)
    curve.load_endpoint(first.state_dict(), "start")
    curve.load_endpoint(last.state_dict(), "end")
    curve.init_linear()
    return curve


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
@pytest.mark.parametrize("num_bends", [2, 3, 5])
def test_ends_give_the_logits_of_the_two_networks_bit_for_bit(kind, num_bends):
    first, last = network(1).eval(), network(2).eval()
    curve = CurveNetwork(copy.deepcopy(first), num_bends, kind).eval()
    for end, t, which in ((first, 0.0, "start"), (last, 1.0, "end")):
        # the buffers are those of the network that was loaded last
        curve.load_endpoint(end.state_dict(), which)
        curve.init_linear()
        assert torch.equal(curve(images(), t), end(images()))
        curve.move_to(t)
        assert torch.equal(curve(images()), end(images()))
        assert torch.equal(curve.export(t)(images()), end(images()))
    assert curve.ends_differ()


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
def test_init_linear_is_the_straight_segment(kind):
    first, last = network(1).double(), network(2).double()
    curve = curve_between(first.float(), last.float(), num_bends=4, curve=kind).double()
    for t in (0.0, 0.3, 1 / 3, 0.77, 1.0):
        for name, value in curve.weights_at(torch.tensor(t, dtype=torch.float64)).items():
            straight = (1 - t) * first.get_parameter(name).double() + t * last.get_parameter(name).double()
            torch.testing.assert_close(value, straight, rtol=0.0, atol=1e-7)


def test_polychain_passes_through_its_bends():
    curve = curve_between(network(1), network(2), curve="polychain")
    bend = curve.bends[0]
    with torch.no_grad():
        bend.classifier.weight.normal_()
    assert torch.equal(curve.weights_at(0.5)["classifier.weight"], bend.classifier.weight)


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
@pytest.mark.parametrize("free", [False, True])
def test_gradient_of_a_bend_is_its_coefficient_times_that_of_the_weights(kind, free):
    curve = curve_between(network(1), network(2), num_bends=4, curve=kind, fix_start=not free, fix_end=not free, t=0.4)
    targets = torch.arange(6) % 10
    F.cross_entropy(curve(images()), targets).backward()
    plain = curve_between(network(1), network(2), num_bends=4, curve=kind).export(0.4)
    # the same buffers, but they play no part in train mode
    F.cross_entropy(plain(images()), targets).backward()
    coefficients = curve_coefficients(torch.tensor(0.4), 4, kind)
    assert coefficients.count_nonzero() >= 2
    for j, bend in enumerate([curve.network, *curve.bends]):
        for name, parameter in plain.named_parameters():
            gradient = bend.get_parameter(name).grad
            if j in (0, 3) and not free:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, coefficients[j] * parameter.grad, rtol=1e-5, atol=1e-7)


def test_regulariser_pulls_each_bend_along_the_weights_at_t():
    curve, wd = curve_between(network(1), network(2), t=0.3), 3e-4
    penalty = 0.5 * wd * sum(value.square().sum() for value in curve.weights_at().values())
    penalty.backward()
    middle = curve_coefficients(torch.tensor(0.3), 3)[1]
    for name, value in curve.weights_at().items():
        torch.testing.assert_close(curve.bends[0].get_parameter(name).grad, wd * middle * value.detach())


def test_fixed_ends_never_move():
    curve = curve_between(network(1), network(2))
    ends = [copy.deepcopy(bend.state_dict()) for bend in (curve.network, curve.bends[-1])]
    optimizer = torch.optim.SGD(curve.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for t in (0.2, 0.0, 0.9):
        curve.move_to(t)
        optimizer.zero_grad()
        curve(images()).square().sum().backward()
        optimizer.step()
    for bend, before in zip((curve.network, curve.bends[-1]), ends, strict=True):
        for name, parameter in bend.named_parameters():
            assert torch.equal(parameter, before[name])
    straight = curve_between(network(1), network(2))
    assert not torch.equal(curve.bends[0].classifier.weight, straight.bends[0].classifier.weight)


def _torchvision():
    import torchvision

    return torchvision.models.resnet18(num_classes=3)


def _timm():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, num_classes=3, depth=1)


@pytest.mark.parametrize("build", [_torchvision, _timm])
def test_exported_networks_of_other_libraries(build):
    torch.manual_seed(0)
    first, last, x = build(), build(), torch.rand(2, 3, 32, 32)
    curve = curve_between(first, last).eval()
    exported = curve.export(0.3)
    assert not exported.training
    assert type(exported) is type(first)
    assert list(exported.state_dict()) == list(first.state_dict())
    assert all(parameter.requires_grad for parameter in exported.parameters())
    with torch.no_grad():
        torch.testing.assert_close(exported(x), curve(x, 0.3), rtol=0.0, atol=0.0)
        assert not torch.allclose(exported(x), first.eval()(x))


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.last = nn.Linear(3, 3, bias=False)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(self.first(x).relu())

    torch.manual_seed(1)
    one, other, x = Tied(), Tied(), torch.randn(4, 3)
    curve = curve_between(one, other)
    for t, end in ((0.0, one), (1.0, other)):
        assert torch.equal(curve(x, t), end(x))
        assert torch.equal(curve.export(t)(x), end(x))


def test_endpoints_from_files(tmp_path):
    first, last = network(1), network(2)
    host = ImageClassifier(copy.deepcopy(first))
    torch.save({"state_dict": host.state_dict(), "epoch": 3}, tmp_path / "first.ckpt")
    save_file(last.state_dict(), tmp_path / "last.safetensors")
    curve = CurveNetwork(network(3), start=str(tmp_path / "first.ckpt"), end=str(tmp_path / "last.safetensors"))
    expected = curve_between(last, first)
    expected.load_endpoint(last.state_dict(), "end")
    expected.load_endpoint(first.state_dict(), "start")
    expected.init_linear()
    for name, value in curve.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_state_dict_brings_back_the_curve():
    curve = curve_between(network(1), network(2), t=0.25)
    twin = CurveNetwork(network(3))
    twin.load_state_dict(curve.state_dict())
    clone = pickle.loads(pickle.dumps(curve))
    for other in (twin, clone, copy.deepcopy(curve)):
        assert torch.equal(other.eval()(images()), curve.eval()(images()))
    assert "network.classifier.weight" in curve.state_dict()
    assert "bends.1.classifier.weight" in curve.state_dict()


def test_attacks_see_the_network_at_the_position():
    curve = curve_between(network(1), network(2)).eval()
    attack, targets = PGD(eps=0.1, steps=3, random_start=False), torch.arange(6) % 10
    for t in (0.1, 0.9):
        curve.move_to(t)
        found = attack(curve, images(), targets)
        assert torch.equal(found, attack(curve.export(t), images(), targets))
    assert [p.requires_grad for p in curve.network.parameters()] == [False] * len(list(curve.network.parameters()))


def test_half_precision_keeps_the_coefficients():
    curve = curve_between(network(1), network(2), t=0.3).to(torch.bfloat16)
    weights = curve.weights_at()
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert curve(images().bfloat16()).dtype == torch.bfloat16


def test_bad_input(tmp_path):
    for arguments, words in (
        ({"num_bends": 1}, "`num_bends` to be at least 2.* got 1"),
        ({"curve": "line"}, "`curve`"),
        ({"t": 1.5}, r"`t` to be in \[0, 1\], but got 1.5"),
        ({"network": nn.ReLU()}, "`network` to have parameters, but ReLU"),
        ({"network": parametrizations.spectral_norm(nn.Linear(2, 2))}, "parametrisations of ParametrizedLinear"),
    ):
        with pytest.raises(ValueError, match=words):
            CurveNetwork(**{"network": nn.Linear(2, 2), **arguments})
    with pytest.raises(FileNotFoundError, match="none.ckpt"):
        CurveNetwork(nn.Linear(2, 2), end=str(tmp_path / "none.ckpt"))
    curve = CurveNetwork(nn.Linear(2, 2))
    assert not curve.ends_differ()
    for t in (-0.1, float("nan")):
        for call in (curve.move_to, curve.weights_at, curve.export):
            with pytest.raises(ValueError, match=r"`t` to be in \[0, 1\]"):
                call(t)
    with pytest.raises(
        ValueError, match=r"1 missing: bias; 1 unexpected: scale; 1 of another shape: weight \(\(1, 2\) instead"
    ):
        curve.load_endpoint({"weight": torch.ones(1, 2), "scale": torch.ones(1)}, "end")
    with pytest.raises(ValueError, match="`which`"):
        curve.load_endpoint(nn.Linear(2, 2).state_dict(), "middle")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="to hold a state dict of tensors, but got a list"):
        curve.load_endpoint(str(tmp_path / "list.pt"), "end")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="broken.safetensors to be a whole safetensors file"):
        curve.load_endpoint(str(tmp_path / "broken.safetensors"), "end")
