"""WeightEnsemble: the mean of probabilities in NumPy, one and equal members, points of a curve, attacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import softmax
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lightning_trust.attacks import PGD
from lightning_trust.nn import WeightEnsemble
from tests.nn.adversarial.test_curve import curve_between, images, network


def test_mean_of_probabilities():
    members = [network(seed).eval() for seed in range(3)]
    with torch.no_grad():
        expected = np.mean([softmax(member(images()).numpy(), axis=1) for member in members], axis=0)
        found = WeightEnsemble(members)(images())
    np.testing.assert_allclose(found.exp().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("copies", [1, 3])
def test_copies_of_one_network_are_that_network(copies):
    net = network(1).eval()
    found = WeightEnsemble([net] * copies)(images())
    torch.testing.assert_close(found, net(images()).log_softmax(dim=1))


@pytest.mark.parametrize("single", [True, False])
def test_weights_come_from_files(tmp_path, single):
    members = [network(seed).eval() for seed in (1, 2)]
    save_file(members[0].state_dict(), tmp_path / "one.safetensors")
    # as a host has them
    torch.save({"state_dict": nn.ModuleDict({"net": members[1]}).state_dict()}, tmp_path / "two.ckpt")
    files = [str(tmp_path / name) for name in ("one.safetensors", "two.ckpt")]
    given = [network(3)] if single else [network(3), network(4)]
    torch.testing.assert_close(WeightEnsemble(given, files).eval()(images()), WeightEnsemble(members)(images()))


def test_certain_members_stay_finite():
    class Fixed(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([logits]))

        def forward(self, x):
            return self.logits.expand(len(x), -1)

    found = WeightEnsemble([Fixed([500.0, 0.0]), Fixed([0.0, 500.0])])(torch.zeros(1, 1))
    torch.testing.assert_close(found.exp(), torch.tensor([[0.5, 0.5]]))


def test_points_of_a_curve_have_statistics_of_their_own():
    curve = curve_between(network(1), network(2))
    ensemble = WeightEnsemble.of_curve(curve, [0.2, 0.8])
    assert [
        torch.equal(one.classifier.weight, curve.weights_at(t)["classifier.weight"])
        for one, t in zip(ensemble.networks, [0.2, 0.8], strict=True)
    ] == [True, True]
    update_bn(DataLoader(images(8), batch_size=4), ensemble)
    for t, member in zip([0.2, 0.8], ensemble.networks, strict=True):
        alone = curve.export(t)
        update_bn(DataLoader(images(8), batch_size=4), alone)
        torch.testing.assert_close(member.features[1].running_mean, alone.features[1].running_mean)
    means = [member.features[1].running_mean for member in ensemble.networks]
    assert not torch.allclose(*means)


def test_attacks_go_through():
    ensemble, targets = WeightEnsemble([network(1), network(2)]).eval(), torch.arange(6) % 10
    x = images()
    moved = PGD(eps=0.1, steps=5, random_start=False)(ensemble, x, targets)
    losses = [nn.functional.cross_entropy(ensemble(inputs), targets).item() for inputs in (x, moved)]
    assert losses[1] > losses[0]


def test_bad_input():
    with pytest.raises(ValueError, match="at least one network"):
        WeightEnsemble([])
    with pytest.raises(ValueError, match="a file for each network, or several for a single one, but got 1 for 2"):
        WeightEnsemble([network(1), network(2)], ["one.ckpt"])
    with pytest.raises(ValueError, match="but got 0 for 1 networks"):
        WeightEnsemble([network(1)], [])
    with pytest.raises(FileNotFoundError, match=r"'none\.ckpt' does not exist"):
        WeightEnsemble([network(1)], ["none.ckpt"])
    curve = curve_between(network(1), network(2))
    with pytest.raises(ValueError, match="`ts` to hold at least one"):
        WeightEnsemble.of_curve(curve, [])
    with pytest.raises(ValueError, match=r"`t` to be in \[0, 1\], but got 2"):
        WeightEnsemble.of_curve(curve, [0.5, 2.0])
    with pytest.raises(ValueError, match=r"the same classes, but got outputs \[\(1, 2\), \(1, 3\)\]"):
        WeightEnsemble([nn.Linear(1, 2), nn.Linear(1, 3)])(torch.zeros(1, 1))
