"""Derivatives from values against closed forms and autograd."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from lightning_trust.nn import (
    AutogradDerivatives,
    FiniteDifference,
    SineMLP,
    SparseGridDerivatives,
    SteinDerivatives,
)
from tests.two_ranks import run_on_two_ranks

D = 3


def all_of_them():
    return [SparseGridDerivatives(D), SteinDerivatives(n=64), FiniteDifference(), AutogradDerivatives()]


def points(rows=5, dim=D):
    return torch.rand(rows, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def wave(z):
    """Product of sines: smoothing damps it by exp(-D sigma^2 / 2)."""
    return z.sin().prod(dim=1)


def test_sum_of_squares_on_the_grid():
    x = points(dim=21)
    value, gradient, second = SparseGridDerivatives(21)(lambda z: z.square().sum(1), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))
    torch.testing.assert_close(gradient, 2 * x)
    torch.testing.assert_close(value, x.square().sum(1) + 0.21)


def test_sum_of_cubes_on_the_grid():
    x = points(dim=21)
    _, gradient, second = SparseGridDerivatives(21, sigma=0.2)(lambda z: z.pow(3).sum(1), x)
    torch.testing.assert_close(gradient, 3 * x**2 + 3 * 0.2**2)
    torch.testing.assert_close(second, 6 * x)


def test_level_three_in_one_dimension_is_a_central_difference():
    x, h = points(dim=1), 0.1 * math.sqrt(3)
    _, gradient, second = SparseGridDerivatives(1, 3, 0.1)(lambda z: z[:, 0].exp(), x)
    ahead, here, behind = (x + h).exp(), x.exp(), (x - h).exp()
    torch.testing.assert_close(gradient, (ahead - behind) / (2 * h))
    torch.testing.assert_close(second, (ahead + behind - 2 * here) / h**2)


def test_higher_levels_come_nearer_to_the_smoothed_function():
    x, sigma = points(), 0.3
    damped = math.exp(-D * sigma**2 / 2) * wave(x)
    errors = []
    for level in (3, 4, 5):
        estimator = SparseGridDerivatives(D, level, sigma)
        value, gradient, second = estimator(wave, x)
        torch.testing.assert_close(estimator.value(wave, x), value)
        errors.append([(e - f).norm().item() for e, f in zip(
            (value, gradient, second), (damped, damped[:, None] / x.tan(), -damped[:, None].expand(-1, D)), strict=True
        )])  # fmt: skip
    for lower, higher in itertools.pairwise(errors):
        assert all(b < a / 5 for a, b in zip(lower, higher, strict=True))


def test_many_draws_come_to_the_smoothed_function():
    x, sigma = points(2, 2), 0.5
    damped = math.exp(-(sigma**2)) * wave(x)
    estimator = SteinDerivatives(n=200_000, sigma=sigma)
    value, gradient, second = estimator(wave, x)
    torch.testing.assert_close(value, damped, rtol=0, atol=2e-3)
    torch.testing.assert_close(gradient, damped[:, None] / x.tan(), rtol=0, atol=5e-3)
    torch.testing.assert_close(second, -damped[:, None].expand(-1, 2), rtol=0, atol=2e-2)
    torch.testing.assert_close(estimator.value(wave, x, key=0), value)


def test_stein_error_falls_with_the_root_of_the_draws():
    x = points(200, 2)

    def error(n):
        return (SteinDerivatives(n, sigma=0.3)(lambda z: z.square().sum(1), x).second - 2.0).square().mean().sqrt()

    assert (error(64) / error(1024)).item() == pytest.approx(4.0, rel=0.2)


def test_stein_draws_are_keyed():
    x = points()
    estimator = SteinDerivatives(n=4)
    first, second = estimator(wave, x), estimator(wave, x)
    assert not torch.equal(first.gradient, second.gradient)
    state = torch.get_rng_state()
    again = SteinDerivatives(n=4)
    assert torch.equal(again(wave, x).gradient, first.gradient)
    assert torch.equal(again(wave, x, key=0).gradient, first.gradient)
    assert torch.equal(again(wave, x, key=1).gradient, second.gradient)
    assert not torch.equal(SteinDerivatives(n=4, seed=1)(wave, x).gradient, first.gradient)
    assert torch.equal(torch.get_rng_state(), state)
    # every point has draws of its own
    same = x[:1].expand(2, -1)
    gradient = again(wave, same).gradient
    assert not torch.equal(gradient[0], gradient[1])


def test_stein_draws_of_two_ranks_are_those_of_one(tmp_path):
    x = points(6)

    def part(rank):
        return SteinDerivatives(n=4)(wave, x[rank::2], key=7).second

    whole = SteinDerivatives(n=4)(wave, x, key=7).second
    found = run_on_two_ranks(tmp_path / "ranks", part)
    torch.testing.assert_close(torch.stack(found, dim=1).flatten(0, 1), whole)


def test_finite_differences_are_off_by_the_square_of_the_step():
    x = points()
    exact = AutogradDerivatives()(wave, x)
    coarse, fine = FiniteDifference(h=0.1)(wave, x), FiniteDifference(h=0.01)(wave, x)
    for k in (1, 2):
        ratio = (coarse[k] - exact[k]).norm() / (fine[k] - exact[k]).norm()
        assert ratio.item() == pytest.approx(100.0, rel=0.05)
    torch.testing.assert_close(fine.value, wave(x))


def test_autograd_is_exact():
    x = points()
    value, gradient, second = AutogradDerivatives()(wave, x)
    torch.testing.assert_close(value, wave(x))
    torch.testing.assert_close(gradient, wave(x)[:, None] / x.tan())
    torch.testing.assert_close(second, -wave(x)[:, None].expand(-1, D))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("number", range(4))
def test_runs_without_gradients(mode, number):
    estimator = all_of_them()[number]
    network = SineMLP(D, 8)
    expected = estimator(network, points().float(), key=5)
    with mode():
        found = estimator(network, points().float(), key=5)
    for got, want in zip(found, expected, strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, want.detach())


@pytest.mark.parametrize("number", range(4))
def test_parameters_get_the_gradient_of_the_residual(number):
    estimator = all_of_them()[number]
    network = SineMLP(D, 6, layers=2).double()
    x = points()

    def loss():
        value, gradient, second = estimator(network, x, key=1)
        return (value + gradient.sum(1) * second.sum(1)).square().mean()

    loss().backward()
    weight = network[0].weight
    with torch.no_grad():
        for index in ((0, 0), (3, 2)):
            kept, h = weight[index].item(), 1e-6
            weight[index] = kept + h
            ahead = loss().item()
            weight[index] = kept - h
            behind = loss().item()
            weight[index] = kept
            assert weight.grad[index].item() == pytest.approx((ahead - behind) / (2 * h), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("number", range(4))
def test_counts_and_parts(number):
    estimator = all_of_them()[number]
    x = points()
    asked = []

    def f(z):
        asked.append(len(z))
        return wave(z)

    whole = estimator(f, x, key=2)
    assert estimator.calls == 1
    assert sum(asked) == estimator.evaluations == len(x) * estimator.points_per_point(D)
    estimator.max_rows = 4
    for one, other in zip(estimator(f, x, key=2), whole, strict=True):
        torch.testing.assert_close(one, other)
    assert max(asked[2:]) <= 4
    assert pickle.loads(pickle.dumps(estimator)).evaluations == estimator.evaluations


def test_points_of_the_settings():
    assert [each.points_per_point(D) for each in all_of_them()] == [25, 129, 7, 1]
    assert SparseGridDerivatives(21).points_per_point(21) == 925


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", range(4))
def test_results_have_the_type_of_the_points(number, dtype):
    seen = set()

    def column(z):
        seen.add(z.dtype)
        return wave(z)[:, None]

    found = all_of_them()[number](column, points().to(dtype))
    assert seen == {each.dtype for each in found} == {dtype}


def test_sums_in_float64_keep_what_a_float32_network_rounds_small():
    network = SineMLP(21, 32)
    precise = copy.deepcopy(network).double()
    x = points(dim=21)
    estimator = SparseGridDerivatives(21)
    with torch.no_grad():
        found = estimator(lambda z: network(z.float()).double(), x).second.sum(1)
        expected = estimator(precise, x).second.sum(1)
        # rounding of 3e-8 a value, through sqrt(sum of squared coefficients) of about 4100 / sigma^2
        assert (found - expected).abs().max() < 0.1


def test_function_without_an_input_has_no_derivatives():
    bias = nn.Parameter(torch.tensor([2.0]))
    for estimator in all_of_them():
        value, gradient, second = estimator(lambda z: bias.expand(len(z)), points())
        torch.testing.assert_close(value, torch.full((5,), 2.0, dtype=torch.float64))
        assert gradient.abs().max() == second.abs().max() == 0.0


class TestComparisonOfLevels:
    def test_card_example_is_found(self):
        x = points(dim=21)
        estimator = SparseGridDerivatives(21)

        def f(z):
            return z.sum(1).sin()

        # 49 % too large, says the card
        ratio = estimator(f, x).second / (-f(x)[:, None])
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1.49), rtol=0, atol=0.005)
        with pytest.warns(
            UserWarning, match=r"level 3 and 4 differ by 61%: .* sigma=0.1 \(lower `sigma` or raise `level`\)"
        ):
            found = estimator.compare_levels(f, x)
        assert found == pytest.approx(0.61, abs=0.01)

    def test_smooth_functions_pass_in_silence(self, recwarn):
        assert SparseGridDerivatives(D).compare_levels(wave, points()) < 0.02
        assert SparseGridDerivatives(D, 5).compare_levels(wave, points()) < 0.01
        assert not recwarn.list

    def test_rounding_of_a_linear_function_is_no_difference(self):
        assert SparseGridDerivatives(21).compare_levels(lambda z: z.sum(1), points(dim=21)) < 1e-6

    def test_counts_both_grids(self):
        estimator = SparseGridDerivatives(D)
        estimator.compare_levels(wave, points(2))
        assert estimator.evaluations == 2 * (25 + SparseGridDerivatives(D, 4).points_per_point(D))

    def test_no_level_to_compare_with(self):
        with pytest.raises(ValueError, match="another level for dim=60 and level=3"):
            SparseGridDerivatives(60).compare_levels(wave, points(dim=60))

    def test_nan_is_a_difference(self):
        with pytest.warns(UserWarning, match="differ by nan"):
            SparseGridDerivatives(D).compare_levels(lambda z: z.sum(1) * math.nan, points())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseGridDerivatives(3, 6), "Expected argument `level` to be an integer from 1 to 5, but got 6."),
        (lambda: SparseGridDerivatives(3, 0), "Expected argument `level` to be an integer from 1 to 5, but got 0."),
        (lambda: SparseGridDerivatives(3, 2), "Expected argument `level` to be 3, 4 or 5, but got 2: grids of level 1"),
        (lambda: SparseGridDerivatives(3, sigma=0.0), "Expected argument `sigma` to be positive, but got 0.0."),
        (lambda: SparseGridDerivatives(21, 5), r"at most 50000 nodes, .* SteinDerivatives"),
        (lambda: SteinDerivatives(n=0), "Expected argument `n` to be a positive integer, but got 0."),
        (lambda: SteinDerivatives(sigma=-1.0), "Expected argument `sigma` to be positive, but got -1.0."),
        (lambda: FiniteDifference(h=math.nan), "Expected argument `h` to be positive, but got nan."),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_points_and_functions():
    with pytest.raises(ValueError, match=r"shape \(B, 3\), for dim=3, but got \(5, 2\)."):
        SparseGridDerivatives(3)(wave, points(dim=2))
    with pytest.raises(ValueError, match=r"Expected argument `x` to be of shape \(B, D\), but got \(3,\)."):
        FiniteDifference()(wave, torch.zeros(3))
    with pytest.raises(ValueError, match=r"one value a point, but for points of shape \(5, 3\) got \(5, 3\)."):
        AutogradDerivatives()(torch.sin, points())
