"""Signs of masked gradients: one network for each warning, and none for a network without them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_trust.attacks import GradientMaskingWarning, check_gradient_masking
from lightning_trust.core.space import InputSpace
from tests.attacks.networks import draws, images, small


class Rounding(nn.Module):
    """Rounds what it is given; a gradient passes that leads nowhere."""

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x):
        rounded = (10.0 * x).round() / 10.0
        # of the right size, but against the true one
        return rounded.detach() - self.slope * (x - x.detach())


class Noise(nn.Module):
    """Adds noise to outputs."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def found_in(net: nn.Module, eps: float = 0.1, rows: int = 20, **arguments) -> list[str]:
    """What is said, all of it in warnings."""
    x, y = images(rows, net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = check_gradient_masking(net, x, y, eps, draws=draws(rows), **arguments)
    assert [str(warning.message) for warning in caught if warning.category is GradientMaskingWarning] == found
    return found


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_nothing_to_say_of_a_plain_network(norm):
    assert found_in(small(), {"linf": 0.02, "l2": 0.2, "l1": 1.0}[norm], norm=norm, n_queries=200) == []


def test_outputs_that_differ_from_pass_to_pass():
    torch.manual_seed(1)
    (sentence,) = found_in(nn.Sequential(small(), Noise()))
    assert sentence.startswith("Two forward passes on the same inputs differ")
    assert "AutoAttack(version='rand')" in sentence


def test_dropout_that_is_off_is_no_noise():
    net = nn.Sequential(small(), nn.Dropout(0.5)).train()
    assert found_in(net, 0.02, n_queries=100) == []
    assert net.training


def test_probabilities_in_place_of_logits():
    (sentence,) = found_in(nn.Sequential(small(), nn.Softmax(dim=1)), 0.02, n_queries=0)
    assert sentence.startswith("The outputs look like probabilities")


@pytest.mark.parametrize("classes", [2, 3])
def test_too_few_classes_for_a_ratio(classes):
    (sentence,) = found_in(small(classes), 0.02, n_queries=0)
    assert sentence.startswith(f"With {classes} classes there is no targeted difference of logits ratio")


def test_gradients_that_are_exactly_zero():
    sentences = found_in(nn.Sequential(Rounding(), small()), n_queries=0)
    assert sentences == [
        "The gradient of the cross-entropy is exactly 0 in 20 of 20 samples: attacks that follow it go nowhere there."
        " Use loss='dlr' or 'margin', a higher precision, or attacks on scores."
    ]


def test_some_gradients_that_are_exactly_zero():
    # a network so sure of half the samples that the cross-entropy is zero in float32
    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)))

        def forward(self, x):
            outputs = x.flatten(1) @ self.weight
            factor = torch.where(x[:, 0, 0, 0] > 0.5, 1e4, 1.0)
            return outputs * factor[:, None]

    net = Sure()
    x, _ = images(20, net)
    (sentence,) = found_in(net, n_queries=0)
    assert f"exactly 0 in {int((x[:, 0, 0, 0] > 0.5).sum())} of 20 samples" in sentence


def test_square_that_breaks_what_gradients_cannot():
    sentences = found_in(nn.Sequential(Rounding(1.0), small()), n_queries=500)
    (sentence,) = sentences
    assert sentence.startswith("Square, which sees no gradients, broke ")
    # without queries there is no comparison, and for rows of features no square
    assert found_in(nn.Sequential(Rounding(1.0), small()), n_queries=0) == []
    net = nn.Sequential(Rounding(1.0), nn.Unflatten(1, (1, 8, 8)), small())
    x, y = images(20, nn.Sequential(Rounding(1.0), small()))
    assert check_gradient_masking(net, x.flatten(1), y, 0.1) == []


def test_normalised_inputs():
    net = nn.Sequential(Rounding(1.0), small())
    x, y = images(20, net)
    wrapped = lambda z: net(z * 0.3 + 0.4)  # noqa: E731
    with pytest.warns(GradientMaskingWarning, match="Square"):
        found = check_gradient_masking(
            wrapped, (x - 0.4) / 0.3, y, 0.1, space=InputSpace(mean=(0.4,), std=(0.3,)), draws=draws(20)
        )
    assert len(found) == 1


def test_radius_must_be_positive():
    net = small()
    with pytest.raises(ValueError, match="`eps` to be positive, but got 0.0"):
        check_gradient_masking(net, *images(2, net), eps=0.0)
