"""The step onto a hyperplane in a box, against SLSQP, closed forms and its corner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from lightning_trust.functional.adversarial import hyperplane_step, norm_of

NORMS = ("linf", "l2", "l1")


def problem(rows: int = 30, size: int = 8, reach: float = 0.5):
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(rows, size, generator=generator, dtype=torch.float64)
    w = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    # a part of what the box lets each gain, with either sign
    most = torch.where(w > 0, w * (1 - x), -w * x).sum(dim=1)
    least = torch.where(w > 0, -w * x, w * (1 - x)).sum(dim=1)
    up = torch.arange(rows) % 2 == 0
    return x, w, reach * torch.where(up, most, least)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reach", [0.05, 0.5, 0.95])
def test_step_reaches_the_hyperplane_inside_the_box(norm, reach):
    x, w, gap = problem(reach=reach)
    step = hyperplane_step(x, w, gap, norm)
    torch.testing.assert_close((w * step).sum(dim=1), gap)
    assert (x + step).min() >= -1e-12
    assert (x + step).max() <= 1 + 1e-12


@pytest.mark.parametrize("reach", [0.1, 0.6])
def test_no_shorter_step_exists(reach):
    x, w, gap = problem(rows=6, size=5, reach=reach)
    for row in range(6):
        a, b, g = x[row].numpy(), w[row].numpy(), gap[row].item()
        # linf and l1 as linear programs, with a bound t on every entry or one for each
        n = len(a)
        box = [(-low, 1 - low) for low in a]
        linf = linprog(
            np.r_[np.zeros(n), 1.0],
            A_ub=np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]]),
            b_ub=np.zeros(2 * n),
            A_eq=np.r_[b, 0.0][None],
            b_eq=[g],
            bounds=[*box, (0, None)],
        ).fun
        l1 = linprog(
            np.r_[np.zeros(n), np.ones(n)],
            A_ub=np.block([[np.eye(n), -np.eye(n)], [-np.eye(n), -np.eye(n)]]),
            b_ub=np.zeros(2 * n),
            A_eq=np.r_[b, np.zeros(n)][None],
            b_eq=[g],
            bounds=[*box, *[(0, None)] * n],
        ).fun
        l2 = (
            minimize(
                lambda d: d @ d,
                np.zeros(n),
                method="SLSQP",
                bounds=box,
                constraints=[{"type": "eq", "fun": lambda d, b=b, g=g: b @ d - g}],
                options={"ftol": 1e-14, "maxiter": 500},
            ).fun
            ** 0.5
        )
        for norm, least in (("linf", linf), ("l2", l2), ("l1", l1)):
            step = hyperplane_step(x[row : row + 1], w[row : row + 1], gap[row : row + 1], norm)
            assert norm_of(step, norm).item() == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize(("norm", "dual"), [("linf", "l1"), ("l2", "l2"), ("l1", "linf")])
def test_far_from_the_faces_the_length_is_the_gap_over_the_dual_norm(norm, dual):
    _, w, _ = problem()
    gap = torch.full((30,), 1e-3, dtype=torch.float64)
    step = hyperplane_step(torch.full_like(w, 0.5), w, gap, norm)
    torch.testing.assert_close(norm_of(step, norm), gap / norm_of(w, dual))


@pytest.mark.parametrize("norm", NORMS)
def test_out_of_reach_it_goes_to_the_corner(norm):
    x, w, gap = problem(reach=3.0)
    corner = torch.where(w * gap[:, None] > 0, 1.0, 0.0)
    torch.testing.assert_close(x + hyperplane_step(x, w, gap, norm), corner.double())


@pytest.mark.parametrize("norm", NORMS)
def test_entries_without_weight_and_gaps_of_zero_stay(norm):
    x, w, gap = problem()
    w[:, 2] = 0.0
    gap[0] = 0.0
    step = hyperplane_step(x, w, 0.3 * gap, norm)
    assert (step[:, 2] == 0).all()
    assert (step[0] == 0).all()
    assert not hyperplane_step(x, torch.zeros_like(w), gap, norm).any()


def test_other_boxes():
    x, w, gap = problem()
    for norm in NORMS:
        wide = hyperplane_step(255 * x - 100, w, 255 * gap, norm, -100.0, 155.0)
        torch.testing.assert_close(wide, 255 * hyperplane_step(x, w, gap, norm))
