"""The share of saliency inside a region: a linear network by hand, the Jacobian, modes, ranks and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_trust.metrics import SaliencyMass
from lightning_trust.nn import SmallCNN
from tests.two_ranks import run_on_two_ranks


def linear():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 4, 5)).double()
    inputs = torch.randn(20, 2, 3, 4, dtype=torch.float64)
    targets = torch.arange(20) % 5
    regions = torch.rand(20, 3, 4) < 0.4
    regions[:, 0, 0] = True
    return network, inputs, targets, regions


def mass_by_hand(network, targets, regions, kind="abs_grad"):
    """The gradient of a linear network is its row, whatever the image."""
    weight = network[1].weight.detach().numpy().reshape(5, 2, 3, 4)
    shares = []
    for y, region in zip(targets.tolist(), regions.numpy(), strict=True):
        pixels = np.abs(weight[y]).mean(0) if kind == "abs_grad" else np.abs(weight[y].mean(0))
        shares.append(pixels[region].sum() / pixels.sum())
    return float(np.mean(shares))


@pytest.mark.parametrize("kind", ["grad", "abs_grad"])
def test_linear_network_has_the_shares_of_its_weights(kind):
    network, inputs, targets, regions = linear()
    metric = SaliencyMass(kind)
    # batches of unequal size: a mean over images, not over batches
    metric.update(network, inputs[:3], targets[:3], regions[:3])
    metric.update(network, inputs[3:], targets[3:], regions[3:])
    found = metric.compute().item()
    assert found == pytest.approx(mass_by_hand(network, targets, regions, kind), rel=1e-6)
    other = {"grad": "abs_grad", "abs_grad": "grad"}[kind]
    assert found != pytest.approx(mass_by_hand(network, targets, regions, other), abs=1e-4)


def test_convolutions_have_the_shares_of_the_jacobian():
    torch.manual_seed(0)
    network = SmallCNN(widths=(4, 4)).eval()
    inputs, targets = torch.rand(6, 1, 8, 8), torch.arange(6)
    regions = torch.zeros(6, 8, 8, dtype=torch.bool)
    regions[:, 2:7, 1:5] = True
    shares = []
    for row, target in enumerate(targets.tolist()):
        jacobian = torch.autograd.functional.jacobian(network, inputs[row : row + 1])[0, target, 0, 0].double().abs()
        shares.append((jacobian[2:7, 1:5].sum() / jacobian.sum()).item())
    metric = SaliencyMass()
    metric.update(network, inputs, targets, regions)
    assert metric.compute().item() == pytest.approx(np.mean(shares), rel=1e-5)
    whole = SaliencyMass()
    whole.update(network, inputs, targets, torch.ones_like(regions))
    assert whole.compute().item() == 1.0


def test_a_map_that_knows_nothing_has_the_share_of_pixels():
    network, inputs, targets, regions = linear()
    metric = SaliencyMass()
    metric.update(network, inputs, targets, regions, -torch.ones(20, 3, 4))
    assert metric.compute().item() == pytest.approx(regions.float().mean().item())


def test_images_without_a_map_are_left_out_with_a_warning():
    network, inputs, targets, regions = linear()
    network[1].weight.data[2] = 0.0
    metric = SaliencyMass()
    metric.update(network, inputs, targets, regions)
    with pytest.warns(UserWarning, match="4 images have a map that is zero all over"):
        found = metric.compute().item()
    seen = targets != 2
    assert found == pytest.approx(mass_by_hand(network, targets[seen], regions[seen]), rel=1e-6)
    metric.reset()
    assert math.isnan(metric.compute())


def test_network_is_left_as_it_was_under_inference_mode():
    network = SmallCNN(widths=(4, 4)).train()
    next(network.children()).eval()
    modes = [module.training for module in network.modules()]
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.inference_mode():
        SaliencyMass().update(network, torch.rand(6, 1, 8, 8), torch.arange(6), torch.ones(6, 8, 8, dtype=torch.bool))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(buffers[name], buffer) for name, buffer in network.named_buffers())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


def test_two_ranks_count_all_samples(tmp_path):
    network, inputs, targets, regions = linear()

    def measured(rank):
        metric = SaliencyMass()
        # unequal parts
        rows = slice(0, 4) if rank == 0 else slice(4, None)
        metric.update(network, inputs[rows], targets[rows], regions[rows])
        return metric.compute()

    for found in run_on_two_ranks(tmp_path, measured):
        assert found.item() == pytest.approx(mass_by_hand(network, targets, regions), rel=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="`saliency` to be one of .*, but got 'smooth'"):
        SaliencyMass("smooth")
    network, inputs, targets, regions = linear()
    metric = SaliencyMass()
    with pytest.raises(ValueError, match=r"`targets` to have a row for each of 20 inputs, but got shape \(19,\)"):
        metric.update(network, inputs, targets[1:], regions)
    with pytest.raises(ValueError, match=r"`regions` to be boolean of shape \(20, 3, 4\), but got torch.float32"):
        metric.update(network, inputs, targets, regions.float())
    with pytest.raises(ValueError, match=r"boolean of shape \(20, 3, 4\), but got torch.bool of shape \(20, 12\)"):
        metric.update(network, inputs, targets, regions.flatten(1))
    with pytest.raises(ValueError, match=r"empty ones at \[2, 5\]"):
        metric.update(
            network, inputs, targets, regions & ~torch.isin(torch.arange(20), torch.tensor([2, 5]))[:, None, None]
        )
    with pytest.raises(ValueError, match=r"`saliency` .* \(20, 2, 3, 4\), but got shape \(20, 4, 3\)"):
        metric.update(network, inputs, targets, regions, torch.rand(20, 4, 3))
    with pytest.raises(ValueError, match="`saliency` to be finite"):
        metric.update(network, inputs, targets, regions, torch.full((20, 3, 4), torch.nan))
