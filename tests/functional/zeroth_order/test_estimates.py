"""Estimates of gradients against autograd and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_trust.functional.zeroth_order import (
    central_difference_gradient,
    coordinate_gradient,
    draw_direction_,
    forward_difference_gradient,
    forward_gradient,
)

N = 24


def smooth(x: Tensor) -> Tensor:
    return torch.sin(x @ torch.linspace(-1, 1, N, dtype=x.dtype)) + (0.3 * x).exp().sum(dim=1)


def sphere(count: int, rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(count, rows, N, generator=generator, dtype=torch.float64)
    return list(drawn / drawn.norm(dim=2, keepdim=True))


def point(rows: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, N, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(smooth(x).sum(), x)
    return x.detach(), gradient


@pytest.mark.parametrize("kind", ["forward", "central"])
def test_cosine_with_the_gradient_rises_with_the_directions(kind):
    x, gradient = point()

    def cosine(q: int) -> float:
        directions = sphere(q, len(x))
        if kind == "forward":
            estimate = forward_difference_gradient(smooth, x, directions, 1e-4, smooth(x))
        else:
            estimate = central_difference_gradient(smooth, x, directions, 1e-4)
        return torch.cosine_similarity(estimate, gradient).mean().item()

    found = [cosine(q) for q in (1, 5, N, 10 * N)]
    assert found == sorted(found)
    assert found[-1] >= 0.9
    assert found[0] < 0.5


def test_estimate_is_unbiased_up_to_the_factor_n():
    x, gradient = point()
    estimate = central_difference_gradient(smooth, x, sphere(20000, 1), 1e-3)
    assert ((N * estimate - gradient).norm(dim=1) < 0.1 * gradient.norm(dim=1)).all()


def test_opposite_points_are_exact_on_a_quadratic():
    x, _ = point()
    matrix = torch.randn(N, N, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    quadratic = lambda z: ((z @ (matrix + matrix.T)) * z).sum(dim=1) / 2 + z.sum(dim=1)  # noqa: E731
    gradient = x @ (matrix + matrix.T) + 1.0
    directions = sphere(3, len(x))
    # the gradient projected on each direction, whatever the length of the step
    expected = torch.stack([(gradient * u).sum(dim=1, keepdim=True) * u for u in directions]).mean(dim=0)
    torch.testing.assert_close(central_difference_gradient(quadratic, x, directions, 0.7), expected)
    one_sided = forward_difference_gradient(quadratic, x, directions, 0.7, quadratic(x))
    assert (one_sided - expected).abs().max() > 1e-2


def quadratic(rows: int = 1) -> tuple:
    """A quadratic with a symmetric matrix, a point, and the gradient there."""
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(N, N, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    x = torch.randn(rows, N, generator=generator, dtype=torch.float64)
    return matrix, x, (lambda z: ((z @ matrix) * z).sum(dim=1) / 2 + z.sum(dim=1)), x @ matrix + 1.0


@pytest.mark.parametrize("mu", [1e-3, 0.5])
def test_coordinates_of_a_quadratic(mu):
    matrix, x, value, gradient = quadratic(3)
    torch.testing.assert_close(coordinate_gradient(value, x, mu), gradient, rtol=0.0, atol=1e-9)
    one_sided = coordinate_gradient(value, x, mu, base=value(x))
    torch.testing.assert_close(one_sided, gradient + mu * matrix.diagonal() / 2.0, rtol=0.0, atol=1e-9)


def test_coordinates_that_are_not_asked_are_zero():
    _, x, value, gradient = quadratic()
    found = coordinate_gradient(lambda z: value(z.flatten(1)), x.view(1, 4, 6), 0.1, coordinates=[2, 23])
    assert found.flatten().nonzero().flatten().tolist() == [2, 23]
    torch.testing.assert_close(found.flatten()[[2, 23]], gradient.flatten()[[2, 23]])


def single_estimates(distribution: str, count: int) -> tuple:
    """Many independent estimates of one direction each, as rows."""
    _, x, value, gradient = quadratic()
    points = x.expand(count, -1)
    directions = draw_direction_(torch.empty(count, N).double(), distribution, torch.Generator().manual_seed(3))
    if distribution == "sphere":
        directions = directions / directions.norm(dim=1, keepdim=True)
    return central_difference_gradient(value, points, [directions], 0.3), gradient


@pytest.mark.parametrize(
    ("distribution", "factor", "square"),
    [("normal", 1.0, N + 2), ("rademacher", 1.0, N), ("sphere", N, N)],
)
def test_moments_of_an_estimate(distribution, factor, square):
    """The mean is the gradient, on the sphere only with the factor n; the mean square is that of the theory."""
    count = 200_000
    found, gradient = single_estimates(distribution, count)
    found = factor * found
    error = found.std(dim=0) / count**0.5
    assert ((found.mean(dim=0) - gradient[0]).abs() < 4.5 * error).all()
    squares = found.square().sum(dim=1)
    expected = square * gradient.square().sum()
    assert (squares.mean() - expected).abs() < 3.0 * squares.std() / count**0.5
    if distribution == "sphere":
        assert ((found.mean(dim=0) / N - gradient[0]).abs() > 4.5 * error).any()


def test_error_falls_as_the_directions_grow():
    q, count = 8, 40_000
    found, gradient = single_estimates("normal", q * count)
    means = found.view(count, q, N).mean(dim=1)
    errors = (means - gradient).square().sum(dim=1)
    expected = (N + 1) / q * gradient.square().sum()
    assert (errors.mean() - expected).abs() < 3.0 * errors.std() / count**0.5


def test_forward_gradient_is_the_gradient_projected_on_the_directions():
    x, gradient = point()
    directions = sphere(3, len(x))
    expected = torch.stack([(gradient * u).sum(dim=1, keepdim=True) * u for u in directions]).mean(dim=0)
    torch.testing.assert_close(forward_gradient(smooth, x, directions), expected)
