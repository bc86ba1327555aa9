"""Problems against their own solutions, by automatic differentiation and outside libraries."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lightning_trust.datamodules import HJB20, BlackScholes1D, Heat, PDEProblem, Poisson
from lightning_trust.functional.zeroth_order import PointDerivatives
from lightning_trust.nn import AutogradDerivatives, SineMLP, SparseGridDerivatives

PROBLEMS = [HJB20(), HJB20(3), BlackScholes1D(), Poisson(1), Poisson(3), Heat(1), Heat(2, diffusivity=0.1)]
NAMES = [f"{type(each).__name__}{each.num_coordinates}" for each in PROBLEMS]


def points(problem, rows=50):
    return problem.sample(rows, torch.Generator().manual_seed(1)).double()


def network(problem):
    net = SineMLP(problem.num_coordinates, 8).double()
    return lambda x: net(x)[:, 0].detach()


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_residual_of_the_exact_solution_is_zero(problem):
    x = points(problem)
    found = AutogradDerivatives()(problem.exact, x)
    assert problem.residual(x, found).abs().max() < 1e-9


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_residual_of_another_function_is_not(problem):
    x = points(problem)
    found = AutogradDerivatives()(lambda z: problem.exact(z) + 0.1 * z.square().sum(1).sin(), x)
    assert problem.residual(x, found).abs().mean() > 1e-3


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_conditions_hold_whatever_the_network(problem):
    net = network(problem)
    timed = not isinstance(problem, Poisson)
    x = points(problem)
    if timed:
        # the initial condition of heat, the terminal one of the others
        edge = x.clone()
        edge[:, -1] = problem.low[-1] if isinstance(problem, Heat) else problem.high[-1]
        torch.testing.assert_close(problem.lift(edge, net), problem.exact(edge))
    if not isinstance(problem, HJB20):
        for axis in range(problem.num_coordinates - timed):
            for side in (problem.low, problem.high):
                edge = x.clone()
                edge[:, axis] = side[axis]
                torch.testing.assert_close(problem.lift(edge, net), problem.exact(edge), rtol=0, atol=1e-12)
    assert (problem.lift(x, net) - problem.exact(x)).abs().max() > 1e-3


def test_hjb_residual_by_hand():
    # -1 + 0 - 0.05 * 20 + 2
    u = PointDerivatives(torch.zeros(1), torch.tensor([[1.0] * 20 + [-1.0]]), torch.zeros(1, 21))
    assert HJB20().residual(torch.zeros(1, 21), u).item() == pytest.approx(0.0, abs=1e-6)
    u.second[0, :2] = torch.tensor([3.0, 4.0])
    u.second[0, 20] = 100.0  # no second derivative in time
    u.gradient[0, 0] = 3.0
    assert HJB20().residual(torch.zeros(1, 21), u).item() == pytest.approx(7.0 - 0.05 * 8, abs=1e-5)


def test_hjb_with_the_constant_one():
    problem = HJB20()
    x = points(problem)
    one = lambda z: torch.ones(len(z), dtype=z.dtype)  # noqa: E731
    torch.testing.assert_close(problem.lift(x, one), problem.exact(x), rtol=1e-14, atol=0)
    found = SparseGridDerivatives(21)(lambda z: problem.lift(z, one), x)
    assert problem.residual(x, found).square().mean() < 1e-10


def test_price_of_a_call_is_that_of_scipy():
    problem = BlackScholes1D(strike=90.0, rate=0.03, volatility=0.3, maturity=2.0, highest=150.0, horizon=1.5)
    x = points(problem)
    price, left = x[:, 0].numpy() * 150.0, 2.0 - x[:, 1].numpy()
    d1 = (np.log(price / 90.0) + (0.03 + 0.045) * left) / (0.3 * np.sqrt(left))
    expected = price * norm.cdf(d1) - 90.0 * np.exp(-0.03 * left) * norm.cdf(d1 - 0.3 * np.sqrt(left))
    np.testing.assert_allclose(150.0 * problem.exact(x).numpy(), expected, atol=1e-9)


def test_call_is_finite_around_the_box():
    problem = BlackScholes1D()
    x = torch.tensor([[-0.2, 0.9], [0.0, -0.2], [1.2, 1.2], [0.5, 0.75]], dtype=torch.float64)
    found = AutogradDerivatives()(lambda z: problem.lift(z, lambda p: p.sum(1)), x)
    assert all(torch.isfinite(each).all() for each in found)


@pytest.mark.parametrize("problem", [Poisson(2), Heat(2)], ids=["Poisson", "Heat"])
def test_lifted_target_is_no_constant(problem):
    x = points(problem, 2000)
    weight = problem.lift(x, lambda z: torch.ones(len(z), dtype=z.dtype)) - problem.lift(x, lambda z: 0.0 * z[:, 0])
    rest = problem.exact(x) - problem.lift(x, lambda z: 0.0 * z[:, 0])
    best = (weight * rest).sum() / weight.square().sum()
    assert (rest - best * weight).norm() / rest.norm() > 0.4


def test_points_fill_the_box():
    problem = BlackScholes1D()
    x = problem.sample(5000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32
    assert (x >= 0.0).all()
    assert (x <= torch.tensor(problem.high)).all()
    torch.testing.assert_close(x.mean(0), torch.tensor([0.5, 0.375]), rtol=0, atol=0.02)
    assert torch.equal(x, problem.sample(5000, torch.Generator().manual_seed(0)))


def test_problem_of_ones_own_without_a_solution():
    class Mine(Poisson):
        exact = PDEProblem.exact

    assert Poisson().has_exact
    assert not Mine().has_exact
    with pytest.raises(NotImplementedError, match="Mine has no exact solution."):
        Mine().exact(torch.zeros(1, 2))


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_pickles(problem):
    x = points(problem)
    assert torch.equal(pickle.loads(pickle.dumps(problem)).exact(x), problem.exact(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HJB20(0), "Expected argument `dim` to be a positive integer, but got 0."),
        (lambda: Poisson(-1), "Expected argument `dim` to be a positive integer, but got -1."),
        (lambda: Heat(1, 0.0), "Expected argument `diffusivity` to be positive, but got 0.0."),
        (lambda: BlackScholes1D(volatility=0.0), "Expected argument `volatility` to be positive, but got 0.0."),
        (lambda: BlackScholes1D(strike=math.nan), "Expected argument `strike` to be positive, but got nan."),
        (lambda: BlackScholes1D(horizon=1.0), "Expected argument `horizon` to be less than maturity=1.0, but got 1.0."),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
