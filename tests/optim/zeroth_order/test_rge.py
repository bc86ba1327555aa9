"""RGE and forward gradients: moments, seeds, and the weights that come back."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.core.randomness import derived_seed
from lightning_trust.optim import RGE, ForwardGradient, LossOracle
from lightning_trust.optim.zeroth_order.directions import SeededDirections


def problem(dtype=torch.float64) -> tuple:
    """A quadratic over two tensors, and its gradient as one vector."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(7, 7, generator=generator, dtype=dtype)
    matrix = matrix + matrix.T
    a = torch.randn(2, 2, generator=generator, dtype=dtype).requires_grad_()
    b = torch.randn(3, generator=generator, dtype=dtype).requires_grad_()

    def loss():
        x = torch.cat([a.flatten(), b])
        return 0.5 * x @ matrix @ x + x.sum()

    return {"a": a, "b": b}, loss, (matrix @ torch.cat([a.detach().flatten(), b.detach()]) + 1.0)


def flat(parameters) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in parameters.values()])


def drawn(parameters, seed, distribution="normal", masks=None) -> torch.Tensor:
    """A direction, written into ``.grad`` once and taken from there."""
    copies = {name: torch.zeros_like(value, requires_grad=True) for name, value in parameters.items()}
    SeededDirections(copies, distribution, masks).add_to_gradients(seed, 1.0)
    return flat(copies)


def test_normalised_parts_have_length_one_and_no_factor():
    parameters, loss, gradient = problem()
    before = {name: value.detach().clone() for name, value in parameters.items()}
    found = RGE(2, 0.01, True, exact_restore=True, normalize="per_tensor").add(LossOracle(loss, parameters, seed=9))
    expected = torch.zeros(7, dtype=torch.float64)
    for place in range(2):
        u = drawn(parameters, derived_seed(9, place))
        u = torch.cat([part / part.norm() for part in u.split([4, 3])])
        # central differences of a quadratic have no error
        expected += (gradient @ u) * u / 2
    torch.testing.assert_close(flat(parameters), expected, rtol=1e-9, atol=1e-9)
    assert math.isnan(found.snr)
    assert all(torch.equal(value.detach(), before[name]) for name, value in parameters.items())


def test_a_normalised_part_without_an_active_entry_stays_zero():
    parameters, loss, _ = problem()
    masks = {"b": torch.zeros(3, dtype=torch.bool), "a": torch.tensor([[True, False], [False, True]])}
    RGE(3, 0.01, normalize="per_tensor").add(LossOracle(loss, parameters, masks=masks, seed=9))
    assert torch.equal(parameters["b"].grad, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(parameters["a"].grad != 0, masks["a"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"normalize": "jointly"}, "`normalize` to be 'per_tensor' or None, but got 'jointly'"),
        ({"normalize": "per_tensor", "distribution": "sphere"}, "to be None where directions lie on the sphere"),
    ],
)
def test_bad_normalisation(arguments, words):
    with pytest.raises(ValueError, match=words):
        RGE(**arguments)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("central", [True, False])
@pytest.mark.parametrize("distribution", ["normal", "rademacher", "sphere"])
def test_estimate_is_the_formula_with_directions_that_were_kept(distribution, central, exact):
    parameters, loss, gradient = problem()
    before = {name: value.detach().clone() for name, value in parameters.items()}
    mu, q = 0.01, 3
    found = RGE(q, mu, central, distribution, exact).add(LossOracle(loss, parameters, seed=9), scale=2.0)
    expected = torch.zeros(7, dtype=torch.float64)
    _, _, matrix_gradient = problem()
    hessian = torch.autograd.functional.hessian(
        lambda x: _quadratic(x), torch.cat([value.flatten() for value in before.values()])
    )
    for place in range(q):
        u = drawn(parameters, derived_seed(9, place), distribution)
        factor = 1.0
        if distribution == "sphere":
            u, factor = u / u.norm(), 7.0
        slope = matrix_gradient @ u + (0.0 if central else mu / 2.0 * u @ hessian @ u)
        expected += factor * slope * u / q
    torch.testing.assert_close(flat(parameters), 2.0 * expected, rtol=1e-9, atol=1e-10)
    assert found.queries == (2 * q if central else q + 1)
    for name, value in parameters.items():
        if exact:
            assert torch.equal(value, before[name])
        torch.testing.assert_close(value.detach(), before[name], rtol=0.0, atol=1e-14)
    assert gradient.shape == (7,)


def _quadratic(x):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    return 0.5 * x @ (matrix + matrix.T) @ x + x.sum()


@pytest.mark.parametrize(("distribution", "square"), [("normal", 9.0), ("rademacher", 7.0), ("sphere", 7.0)])
def test_moments_over_many_seeds(distribution, square):
    """E g = gradient and E |g|^2 = (d + 2) |gradient|^2 for normal directions, d |gradient|^2 for the others."""
    parameters, loss, gradient = problem()
    count = 4000
    estimator = RGE(q=1, mu=0.1, distribution=distribution)
    found = []
    for seed in range(count):
        for value in parameters.values():
            value.grad = None
        estimator.add(LossOracle(loss, parameters, seed=seed))
        found.append(flat(parameters))
    each = torch.stack(found)
    error = each.std(dim=0) / count**0.5
    assert ((each.mean(dim=0) - gradient).abs() < 4.0 * error).all()
    squares = each.square().sum(dim=1)
    assert (squares.mean() - square * gradient.square().sum()).abs() < 4.0 * squares.std() / count**0.5


def test_a_single_precision_estimate_leaves_the_weights_where_they_were():
    parameters, loss, _ = problem(torch.float32)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    RGE(q=5).estimate(loss, parameters)
    for name, value in parameters.items():
        torch.testing.assert_close(value.detach(), before[name], rtol=0.0, atol=1e-6)
    RGE(q=5, exact_restore=True).estimate(loss, parameters)


@pytest.mark.parametrize("distribution", ["normal", "sphere"])
def test_masked_entries_have_no_direction(distribution):
    parameters, loss, gradient = problem()
    mask = torch.tensor([[True, False], [False, True]])
    found = RGE(q=2000, mu=0.1, distribution=distribution).add(LossOracle(loss, parameters, masks={"a": mask}))
    assert (parameters["a"].grad[~mask] == 0.0).all()
    active = torch.cat([mask.flatten(), torch.ones(3, dtype=torch.bool)])
    torch.testing.assert_close(flat(parameters)[active], gradient[active], rtol=0.0, atol=0.15 * float(gradient.norm()))
    assert found.snr == pytest.approx(2000 / (6 if distribution == "normal" else 4), rel=1e-6)


def test_weights_come_back_where_the_loss_fails():
    parameters, loss, _ = problem()
    before = {name: value.detach().clone() for name, value in parameters.items()}
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss()

    with pytest.raises(KeyboardInterrupt):
        RGE(q=4).estimate(fails, parameters)
    for name, value in parameters.items():
        torch.testing.assert_close(value.detach(), before[name], rtol=0.0, atol=1e-14)


def test_dropout_is_the_same_in_all_evaluations():
    layer = nn.Linear(8, 4).double()
    x = torch.randn(16, 8, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    seen = []

    def loss():
        mask = F.dropout(torch.ones(16, 8, dtype=torch.float64), 0.5)
        seen.append(mask)
        return layer(x * mask).square().mean()

    torch.manual_seed(3)
    first = F.dropout(torch.ones(16, 8, dtype=torch.float64), 0.5)
    after = torch.rand(2)
    torch.manual_seed(3)
    RGE(q=2).estimate(loss, parameters, torch.Generator().manual_seed(1))
    assert all(torch.equal(mask, first) for mask in seen)
    # one evaluation was seen by the global generator
    assert torch.equal(torch.rand(2), after)


def test_estimates_of_one_generator_are_equal_and_of_two_are_not():
    found = []
    for seed in (1, 1, 2):
        parameters, loss, _ = problem()
        RGE(q=2).estimate(loss, parameters, torch.Generator().manual_seed(seed))
        found.append(flat(parameters))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_moved_by_normal_numbers(dtype):
    weight = torch.zeros(4000, dtype=dtype, requires_grad=True)
    SeededDirections({"weight": weight}).move(1, by=1.0)
    assert abs(float(weight.float().mean())) < 4.0 / math.sqrt(4000)
    assert float(weight.float().std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q": 0}, "`q` to be an integer of at least 1, but got 0"),
        ({"mu": -1.0}, "`mu` to be a positive number, but got -1.0"),
        (
            {"distribution": "cauchy"},
            r"`distribution` to be one of .*, but got 'cauchy'",
        ),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        RGE(**arguments)


# -- forward gradients -------------------------------------------------------------------------------------------------
def test_forward_gradient_is_the_gradient_projected_on_the_directions():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()
    x, y = torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.arange(6) % 3
    parameters = dict(net.named_parameters())

    def loss():
        return F.cross_entropy(net(x), y)

    gradient = torch.cat([each.flatten() for each in torch.autograd.grad(loss(), list(net.parameters()))])
    statistics = {name: value.clone() for name, value in net.named_buffers()}
    estimator = ForwardGradient(q=3)
    estimator._checked = True
    found = estimator.add(LossOracle(loss, parameters, module=net, seed=4))
    assert all(torch.equal(value, statistics[name]) for name, value in net.named_buffers())
    expected = torch.zeros_like(gradient)
    for place in range(3):
        u = drawn(parameters, derived_seed(4, place))
        expected += (gradient @ u) * u / 3
    torch.testing.assert_close(flat(parameters), expected)
    assert (found.queries, found.equivalent_forwards) == (3, 6.0)


def test_forward_gradient_must_find_the_parameters():
    parameters, loss, _ = problem()
    with pytest.raises(MisconfigurationException, match="pass `module=`"):
        ForwardGradient().estimate(loss, parameters)
    holder = nn.ParameterDict(parameters)
    own = dict(holder.named_parameters())
    with pytest.raises(MisconfigurationException, match="the loss takes its parameters from elsewhere"):
        ForwardGradient().estimate(loss, parameters, module=holder)
    a = holder["a"]
    with pytest.raises(MisconfigurationException, match="the loss takes its parameters from elsewhere"):
        ForwardGradient().estimate(lambda: a.sum() * holder["b"].sum(), own, module=holder)
    ForwardGradient().estimate(lambda: holder["a"].sum() * holder["b"].sum(), own, module=holder)
    with pytest.raises(ValueError, match="`q` to be an integer of at least 1, but got 0"):
        ForwardGradient(q=0)
