"""The deletion curve against a loop in NumPy; modes, ranks and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_trust.metrics import SaliencyFidelity
from lightning_trust.nn import SmallCNN
from tests.two_ranks import run_on_two_ranks

SHARES = (0.0, 0.1, 0.35, 0.6, 0.9)


def linear():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 4, 5)).double()
    inputs = torch.randn(40, 2, 3, 4, dtype=torch.float64)
    targets = network(inputs).argmax(1)
    targets[:6] = (targets[:6] + 1) % 5  # some are wrong from the start
    return network, inputs, targets


def curve_by_hand(network, inputs, targets, fill):
    """The gradient of a linear network is its row; pixels are removed one at a time, over all channels."""
    weight = network[1].weight.detach().numpy().reshape(5, 2, 3, 4)
    bias = network[1].bias.detach().numpy()
    curve = []
    for share in SHARES:
        right = 0
        for x, y in zip(inputs.numpy(), targets.numpy(), strict=True):
            ranked = sorted(
                ((weight[y, :, i, j].mean(), i, j) for i in range(3) for j in range(4)), key=lambda entry: -entry[0]
            )
            removed = x.copy()
            for _, i, j in ranked[: int(share * 12)]:
                removed[:, i, j] = x.mean() if fill == "mean" else 0.0
            right += (np.tensordot(weight, removed, 3) + bias).argmax() == y
        curve.append(right / len(inputs))
    return np.array(curve)


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_curve_and_area_equal_a_loop(fill):
    network, inputs, targets = linear()
    metric = SaliencyFidelity(SHARES, fill=fill)
    metric.update(network, inputs[:17], targets[:17])
    metric.update(network, inputs[17:], targets[17:])
    found = metric.compute()
    expected = curve_by_hand(network, inputs, targets, fill)
    assert 0.0 < expected[-1] < expected[0] < 1.0
    np.testing.assert_allclose(found["curve"], expected, rtol=1e-6)
    area = sum((b - a) * (u + v) / 2 for a, b, u, v in zip(SHARES, SHARES[1:], expected, expected[1:], strict=False))
    assert found["area"].item() == pytest.approx(area / 0.9, rel=1e-5)


def test_network_that_does_not_depend_on_its_input_has_its_accuracy_as_area():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1.0]) + 0.0 * x.flatten(1)[:, :2]

    metric = SaliencyFidelity()
    metric.update(Constant(), torch.rand(8, 1, 4, 4), torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]))
    assert metric.compute()["curve"].tolist() == [0.75] * 10
    assert metric.compute()["area"].item() == pytest.approx(0.75)


def test_a_faithful_map_has_a_smaller_area_than_its_opposite():
    network, inputs, targets = linear()
    rows = network[1].weight.view(5, 2, 3, 4).mean(1)[targets]
    areas = []
    for saliency in (rows, torch.rand_like(rows), -rows):
        metric = SaliencyFidelity(SHARES)
        metric.update(network, inputs, targets, saliency)
        areas.append(metric.compute()["area"].item())
    assert areas[0] < areas[1] < areas[2]
    own = SaliencyFidelity(SHARES)
    own.update(network, inputs, targets)
    assert own.compute()["area"].item() == areas[0]


def test_network_and_inputs_are_left_as_they_were_under_inference_mode():
    network = SmallCNN(widths=(4, 4)).train()
    next(network.children()).eval()
    modes = [module.training for module in network.modules()]
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    x = torch.rand(6, 1, 8, 8)
    before = x.clone()
    with torch.inference_mode():
        metric = SaliencyFidelity((0.0, 0.5))
        metric.update(network, x, torch.arange(6))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(buffers[name], buffer) for name, buffer in network.named_buffers())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(x, before)


def test_two_ranks_count_all_samples(tmp_path):
    network, inputs, targets = linear()

    def measured(rank):
        metric = SaliencyFidelity(SHARES)
        # unequal parts
        rows = slice(0, 9) if rank == 0 else slice(9, None)
        metric.update(network, inputs[rows], targets[rows])
        return metric.compute()

    expected = curve_by_hand(network, inputs, targets, "mean")
    for found in run_on_two_ranks(tmp_path, measured):
        np.testing.assert_allclose(found["curve"], expected, rtol=1e-6)


@pytest.mark.parametrize("fractions", [(0.5,), (0.0, 1.0), (-0.1, 0.5), (0.5, 0.2), (0.2, 0.2), (0.0, float("nan"))])
def test_fractions_out_of_range(fractions):
    with pytest.raises(ValueError, match=r"`fractions` to be two or more ascending shares in \[0, 1\), but got"):
        SaliencyFidelity(fractions)


def test_bad_input():
    with pytest.raises(ValueError, match="`fill` to be one of .*, but got 'random'"):
        SaliencyFidelity(fill="random")
    with pytest.raises(ValueError, match="`saliency` to be one of .*, but got 'smooth'"):
        SaliencyFidelity(saliency="smooth")
    network, inputs, targets = linear()
    metric = SaliencyFidelity()
    with pytest.raises(ValueError, match=r"`targets` .*shape \(40,\), but got \(40, 2\)"):
        metric.update(network, inputs, targets[:, None].expand(40, 2))
    with pytest.raises(ValueError, match=r"`saliency` .* \(40, 2, 3, 4\), but got shape \(40, 4, 3\)"):
        metric.update(network, inputs, targets, torch.rand(40, 4, 3))
