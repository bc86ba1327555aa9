"""Coefficients of curves against NumPy's and their closed forms; the barrier; the choice of a point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import BPoly

from lightning_trust.functional.adversarial import (
    best_positions,
    bezier_coefficients,
    curve_coefficients,
    loss_barrier,
    polychain_coefficients,
)

POSITIONS = torch.linspace(0, 1, 41, dtype=torch.float64)


@pytest.mark.parametrize("curve", ["bezier", "polychain"])
@pytest.mark.parametrize("num_bends", [2, 3, 4, 7])
def test_coefficients_are_a_convex_combination(curve, num_bends):
    for t in POSITIONS:
        coefficients = curve_coefficients(t, num_bends, curve)
        assert coefficients.shape == (num_bends,)
        assert bool((coefficients >= 0).all())
        assert coefficients.sum().item() == pytest.approx(1.0, abs=1e-14)
    for t, own in ((0.0, 0), (1.0, -1)):
        coefficients = curve_coefficients(torch.tensor(t), num_bends, curve)
        # exactly: the ends of the curve are the endpoints, bit for bit
        assert coefficients[own] == 1.0
        assert coefficients.count_nonzero() == 1


@pytest.mark.parametrize("num_bends", [2, 3, 5])
def test_bezier_equals_the_bernstein_polynomials_of_scipy(num_bends):
    for t in POSITIONS:
        expected = [BPoly(np.eye(num_bends)[j][:, None], [0.0, 1.0])(t.item()) for j in range(num_bends)]
        np.testing.assert_allclose(bezier_coefficients(t, num_bends).numpy(), expected, atol=1e-14)


def test_three_bends_in_closed_form():
    for t in POSITIONS:
        expected = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
        torch.testing.assert_close(bezier_coefficients(t, 3), expected, rtol=0.0, atol=1e-15)
    assert polychain_coefficients(torch.tensor(0.5), 3).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("num_bends", [2, 3, 6])
def test_polychain_equals_linear_interpolation_of_numpy(num_bends):
    bends = np.random.default_rng(0).normal(size=num_bends)
    for t in POSITIONS:
        expected = np.interp(t.item(), np.linspace(0, 1, num_bends), bends)
        found = (polychain_coefficients(t, num_bends) * torch.from_numpy(bends)).sum()
        assert found.item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("curve", ["bezier", "polychain"])
def test_evenly_spaced_bends_give_the_straight_segment(curve):
    bends = torch.linspace(-1, 3, 5, dtype=torch.float64)
    for t in POSITIONS:
        point = (curve_coefficients(t, 5, curve) * bends).sum()
        assert point.item() == pytest.approx(-1 + 4 * t.item(), abs=1e-13)


def test_barrier():
    assert loss_barrier([1.0, 0.5, 2.0]) == 0.0
    assert loss_barrier([1.0, 4.0, 2.0]) == 2.0
    with pytest.raises(ValueError, match="both ends"):
        loss_barrier([1.0])


def test_best_positions():
    union, mean = [0.1, 0.3, 0.3, 0.3], [0.9, 0.4, 0.5, 0.5]
    assert best_positions(union, mean) == [2]
    assert best_positions(union, mean, top_k=4) == [2, 3, 1, 0]
    assert best_positions(union, mean, by="mean", top_k=2) == [0, 2]
    for arguments, words in (
        ({"mean": [0.1]}, "one length"),
        ({"by": "max"}, "`by`"),
        ({"top_k": 5}, r"`top_k` to be in \[1, 4\]"),
        ({"top_k": 0}, "`top_k`"),
    ):
        with pytest.raises(ValueError, match=words):
            best_positions(**{"union": union, "mean": mean, **arguments})


def test_bad_input():
    for function in (bezier_coefficients, polychain_coefficients):
        with pytest.raises(ValueError, match="`num_bends` to be at least 2.* got 1"):
            function(torch.tensor(0.5), 1)
    with pytest.raises(ValueError, match="'bezier' or 'polychain', but got 'line'"):
        curve_coefficients(torch.tensor(0.5), 3, "line")
