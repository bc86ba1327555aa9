"""MSD: the better of three steps, in the union of the balls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_trust.attacks import MSD, PGD
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial import norm_of
from tests.attacks.networks import check_attack, draws, images, small

ARGUMENTS = {
    "eps_linf": 0.05,
    "eps_l2": 0.4,
    "eps_l1": 3.0,
    "step_linf": 0.02,
    "step_l2": 0.15,
    "step_l1": 0.05,
}


def test_invariants():
    check_attack(MSD(**ARGUMENTS, steps=5))
    check_attack(MSD(**ARGUMENTS, steps=5, random_start=True, loss="margin"))


def test_result_lies_in_one_of_the_balls_and_gains_loss():
    net = small(smooth=True)
    x, y = images(40, net)
    found = MSD(**ARGUMENTS, steps=10)(net, x, y, draws=draws(40))
    inside = torch.stack(
        [norm_of(found - x, norm) <= ARGUMENTS[f"eps_{norm}"] * (1 + 1e-5) + 1e-6 for norm in ("linf", "l2", "l1")]
    )
    assert inside.any(dim=0).all()
    loss = lambda z: F.cross_entropy(net(z), y, reduction="none")  # noqa: E731
    assert (loss(found) >= loss(x)).all()
    longer = MSD(**ARGUMENTS, steps=20)(net, x, y, draws=draws(40))
    assert (loss(longer) >= loss(found) - 1e-6).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_with_two_balls_of_no_size_it_is_pgd_in_the_third(norm):
    net = small(smooth=True).double()
    x, y = images(20, net)
    sizes = {f"{kind}_{name}": 1e-9 for kind in ("eps", "step") for name in ("linf", "l2", "l1")}
    sizes |= {f"eps_{norm}": ARGUMENTS[f"eps_{norm}"], f"step_{norm}": ARGUMENTS[f"step_{norm}"]}
    found = MSD(**sizes, steps=3)(net, x, y, draws=draws(20))
    plain = PGD(ARGUMENTS[f"eps_{norm}"], ARGUMENTS[f"step_{norm}"], 3, random_start=False, norm=norm)(
        net, x, y, draws=draws(20)
    )
    torch.testing.assert_close(found, plain, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_radii_and_steps_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` to be positive"):
        MSD(**{name: 0.0})


def test_radius_in_other_units_is_noticed():
    net = small()
    with pytest.raises(ValueError, match="Did you mean 8/255"):
        MSD(eps_linf=8.0)(net, *images(2, net))
    with pytest.raises(ValueError, match="`eps` to be in the units"):
        MSD(eps_linf=8.0, space=InputSpace())
