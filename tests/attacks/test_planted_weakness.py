"""Planted weaknesses: a known point of the ball crosses, the clean input does not; who sees the slope finds one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_trust.attacks import (
    CWL2,
    FGSM,
    PGD,
    PlantedWeakness,
    SelfTest,
    Square,
    find_planted_weakness,
)
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial import norm_of
from tests.attacks.networks import draws, images

EPS = {"linf": 0.05, "l2": 0.5, "l1": 4.0}


class Rounding(nn.Module):
    """Rounds what it is given, and with it the gradient to zero."""

    def forward(self, x):
        return (8.0 * x).round() / 8.0


def cnn(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(6)
    net = nn.Sequential(*layers, nn.Conv2d(1, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
    return net.eval()


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("seed", range(4))
def test_known_point_lies_in_ball_and_box_and_crosses(norm, seed):
    net = cnn()
    x, y = images(1, net)
    x[:, :, 0] = 0.0
    planted = PlantedWeakness(net, x, y, EPS[norm], norm, InputSpace(), draws(1, seed))
    assert planted.testable
    assert norm_of(planted.known - x, norm).item() <= EPS[norm] * (1 + 1e-5)
    assert planted.known.min() >= 0.0
    assert planted.known.max() <= 1.0
    # the classes at the clean input and at the known point, and how far each is from the threshold
    assert planted(x).argmax().item() == y.item() != planted(planted.known).argmax().item()
    assert planted(x)[0, planted.other].item() <= -1.0 + 1e-4
    assert planted(planted.known)[0, planted.other].item() == pytest.approx(1.0, abs=1e-4)


def test_another_point_of_the_ball_hardly_ever_crosses():
    net = cnn()
    x, y = images(1, net)
    planted = PlantedWeakness(net, x, y, 0.05, "linf", InputSpace(), draws(1))
    noise = torch.rand(2000, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.1 - 0.05
    assert (planted((x + noise).clamp(0.0, 1.0)).argmax(dim=1) != y).float().mean() < 0.01


def test_network_is_copied_and_left_alone():
    net = cnn().train()
    x, y = images(1, net)
    state = copy.deepcopy(net.state_dict())
    planted = PlantedWeakness(net, x, y, 0.05, "linf", InputSpace(), draws(1))
    planted(x)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(module.training for module in planted.network.modules())
    assert not any(parameter.requires_grad for parameter in planted.parameters())


@pytest.mark.parametrize("norm", EPS)
def test_pgd_finds_what_is_planted_in_a_plain_network(norm):
    net = cnn()
    x, y = images(8, net)
    attack = PGD(EPS[norm], steps=30, norm=norm)
    assert find_planted_weakness(attack, net, x, y, InputSpace()) == SelfTest(found=8, testable=8)


def test_whoever_follows_gradients_finds_nothing_where_they_are_rounded_away():
    net = cnn(Rounding())
    x, y = images(8, net)
    for attack in (PGD(0.1, steps=30), FGSM(0.1)):
        result = find_planted_weakness(attack, net, x, y, InputSpace())
        assert (result.found, result.testable) == (0, 8)


def test_attack_on_scores_needs_no_gradient():
    net = cnn(Rounding())
    x, y = images(6, net)
    assert find_planted_weakness(Square(0.1, n_queries=1000), net, x, y, InputSpace()).found >= 5


def test_normalised_inputs_and_double_precision():
    net = cnn()
    x, y = images(4, net)
    space = InputSpace(mean=(0.4,), std=(0.3,))
    denormalised = nn.Sequential(nn.Identity(), net)
    denormalised[0].forward = lambda z: z * 0.3 + 0.4
    attack = PGD(0.05, steps=30)
    assert find_planted_weakness(attack, denormalised, (x - 0.4) / 0.3, y, space).found == 4
    assert find_planted_weakness(attack, net.double(), x.double(), y, InputSpace()).found == 4


def test_runs_in_validation_under_inference_mode():
    net = cnn()
    x, y = images(3, net)
    with torch.inference_mode():
        result = find_planted_weakness(PGD(0.05, steps=30), net, x.clone(), y.clone(), InputSpace())
    assert result == SelfTest(found=3, testable=3)


def test_outputs_that_never_change_hide_nothing():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.arange(3.0).expand(len(x), 3)

    x = torch.rand(3, 1, 4, 4)
    result = find_planted_weakness(PGD(0.05), Constant(), x, torch.zeros(3, dtype=torch.long), InputSpace())
    assert result == SelfTest(found=0, testable=0)


def test_bad_input():
    net = cnn()
    x, y = images(2, net)
    with pytest.raises(ValueError, match="an attack with a radius `eps`, but CWL2 has none"):
        find_planted_weakness(CWL2(), net, x, y, InputSpace())
    with pytest.raises(ValueError, match="`inner` to be at least 1, but got 0"):
        PlantedWeakness(net, x[:1], y[:1], 0.1, "linf", InputSpace(), draws(1), inner=0)
