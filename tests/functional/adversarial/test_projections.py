"""Projections against KKT conditions, SLSQP and bisection; losses by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_trust.functional.adversarial import (
    dlr_loss,
    dlr_loss_targeted,
    kl_divergence,
    linear_minimiser,
    margin,
    norm_of,
    project_l1,
    project_l1_box,
    project_l2,
    project_linf,
)


def test_l1_projection_meets_its_kkt_conditions():
    v = 3.0 * torch.randn(40, 20, dtype=torch.float64)
    p = project_l1(v, 4.0)
    lengths = norm_of(p, "l1")
    torch.testing.assert_close(lengths, torch.full_like(lengths, 4.0))
    for row in range(40):
        active = p[row] != 0
        thetas = v[row][active].abs() - p[row][active].abs()
        # one multiplier for all active coordinates, at least as large as every inactive one
        torch.testing.assert_close(thetas, thetas[0].expand_as(thetas))
        assert (v[row][~active].abs() <= thetas[0] + 1e-9).all()
    torch.testing.assert_close(project_l1(p, 4.0), p)
    inside = 0.01 * v
    assert torch.equal(project_l1(inside, 4.0), inside)


@pytest.mark.parametrize("seed", range(3))
def test_l1_projections_against_slsqp(seed):
    generator = np.random.default_rng(seed)
    v, x, eps = generator.normal(size=6), generator.uniform(size=6), 0.8

    def solved(bounds):
        # p = a - b with a, b >= 0 makes the ball a linear constraint
        found = minimize(
            lambda z: ((z[:6] - z[6:] - v) ** 2).sum(),
            np.full(12, 0.05),
            method="SLSQP",
            bounds=[(0, None)] * 12,
            constraints=[{"type": "ineq", "fun": lambda z: eps - z.sum()}, *bounds],
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return found.x[:6] - found.x[6:]

    box = [
        {"type": "ineq", "fun": lambda z: 1.0 - x - z[:6] + z[6:]},
        {"type": "ineq", "fun": lambda z: x + z[:6] - z[6:]},
    ]
    row = lambda values: torch.tensor(values)[None]  # noqa: E731
    np.testing.assert_allclose(project_l1(row(v), eps)[0], solved([]), atol=1e-5)
    np.testing.assert_allclose(project_l1_box(row(x), row(v), eps)[0], solved(box), atol=1e-5)


def test_box_projection_equals_bisection():
    x = torch.rand(50, 30, dtype=torch.float64)
    v = torch.randn(50, 30, dtype=torch.float64)
    room = torch.where(v > 0, 1 - x, x)
    low, high = torch.zeros(50, 1, dtype=torch.float64), v.abs().amax(dim=1, keepdim=True)
    at = lambda lam: torch.minimum((v.abs() - lam).clamp_min(0), room)  # noqa: E731
    for _ in range(60):
        middle = (low + high) / 2
        above = at(middle).sum(dim=1, keepdim=True) > 3.0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    lam = torch.where(at(0 * low).sum(dim=1, keepdim=True) <= 3.0, 0 * low, high)
    p = project_l1_box(x, v, 3.0)
    torch.testing.assert_close(p, v.sign() * at(lam), rtol=0.0, atol=1e-6)
    assert (x + p).min() >= -1e-12
    assert (x + p).max() <= 1 + 1e-12
    # far from the faces the box changes nothing
    middle_of_box = torch.full_like(x, 0.5)
    torch.testing.assert_close(project_l1_box(middle_of_box, 0.1 * v, 0.5), project_l1(0.1 * v, 0.5))


@pytest.mark.parametrize("project", [project_linf, project_l2, project_l1], ids=lambda function: function.__name__)
def test_projections_do_not_expand(project):
    a, b = torch.randn(2, 30, 12, dtype=torch.float64)
    moved = (project(a, 1.0) - project(b, 1.0)).norm(dim=1)
    assert (moved <= (a - b).norm(dim=1) + 1e-9).all()
    torch.testing.assert_close(project(project(a, 1.0), 1.0), project(a, 1.0))
    each = torch.linspace(0.1, 2.0, 30, dtype=torch.float64)
    torch.testing.assert_close(project(a, each)[7:8], project(a[7:8], each[7].item()))


@pytest.mark.parametrize(("norm", "dual"), [("linf", "l1"), ("l2", "l2"), ("l1", "linf")])
def test_linear_minimiser_reaches_the_dual_norm(norm, dual):
    gradient = torch.randn(10, 3, 4, dtype=torch.float64)
    point = linear_minimiser(gradient, norm)
    torch.testing.assert_close(norm_of(point, norm), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close((gradient * point).flatten(1).sum(1), -norm_of(gradient, dual))


def test_losses_by_hand():
    logits = torch.tensor([[1.0, 4.0, 2.0, -1.0, 3.0]], dtype=torch.float64)
    y, t = torch.tensor([1]), torch.tensor([2])
    assert margin(logits, y).item() == 1.0
    assert margin(logits, t).item() == -2.0
    assert dlr_loss(logits, y).item() == pytest.approx(-(4 - 3) / (4 - 2))
    assert dlr_loss(logits, t).item() == pytest.approx(-(2 - 4) / (4 - 2))
    assert dlr_loss_targeted(logits, y, t).item() == pytest.approx(-(4 - 2) / (4 - 0.5 * (2 + 1)))
    other = torch.randn(1, 5, dtype=torch.float64)
    p, q = other.softmax(1), logits.softmax(1)
    assert kl_divergence(logits, other).item() == pytest.approx((p * (p / q).log()).sum().item())
    assert dlr_loss(5.0 * logits, y).item() == pytest.approx(dlr_loss(logits, y).item())


def test_losses_say_how_many_classes_they_need():
    two, y = torch.zeros(1, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="at least 3 classes for loss 'dlr', but got logits of 2"):
        dlr_loss(two, y)
    with pytest.raises(ValueError, match="at least 4 classes for loss 'targeted dlr', but got logits of 2"):
        dlr_loss_targeted(two, y, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"shape \(N, K\)"):
        margin(torch.zeros(1, 2, 2), y)
