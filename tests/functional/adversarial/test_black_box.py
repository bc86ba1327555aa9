"""Estimates of gradients against autograd and closed forms; the cosine basis against scipy."""

from __future__ import annotations

import pytest
import torch
from scipy.fft import dct
from torch import Tensor

from lightning_trust.functional.adversarial import antithetic_gradient, dct_matrix, forward_difference_gradient

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


@pytest.mark.parametrize("kind", ["forward", "antithetic"])
def test_cosine_with_the_gradient_rises_with_the_directions(kind):
    x, gradient = point()

    def cosine(q: int) -> float:
        directions = sphere(q, len(x))
        if kind == "forward":
            estimate = forward_difference_gradient(smooth, x, directions, 1e-4, smooth(x))
        else:
            estimate = antithetic_gradient(smooth, x, directions, 1e-4)
        return torch.cosine_similarity(estimate, gradient).mean().item()

    found = [cosine(q) for q in (1, 5, N, 10 * N)]
    assert found == sorted(found)
    assert found[-1] >= 0.9
    assert found[0] < 0.5


def test_estimate_is_unbiased_up_to_the_factor_n():
    x, gradient = point()
    estimate = antithetic_gradient(smooth, x, sphere(20000, 1), 1e-3)
    assert ((N * estimate - gradient).norm(dim=1) < 0.1 * gradient.norm(dim=1)).all()


def test_opposite_points_are_exact_on_a_quadratic():
    x, _ = point()
    matrix = torch.randn(N, N, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    quadratic = lambda z: ((z @ (matrix + matrix.T)) * z).sum(dim=1) / 2 + z.sum(dim=1)  # noqa: E731
    gradient = x @ (matrix + matrix.T) + 1.0
    directions = sphere(3, len(x))
    # the gradient projected on each direction, whatever the length of the step
    expected = torch.stack([(gradient * u).sum(dim=1, keepdim=True) * u for u in directions]).mean(dim=0)
    torch.testing.assert_close(antithetic_gradient(quadratic, x, directions, 0.7), expected)
    one_sided = forward_difference_gradient(quadratic, x, directions, 0.7, quadratic(x))
    assert (one_sided - expected).abs().max() > 1e-2


@pytest.mark.parametrize("size", [1, 2, 7, 28])
def test_cosine_basis_is_that_of_scipy(size):
    expected = torch.from_numpy(dct(torch.eye(size, dtype=torch.float64).numpy(), axis=0, norm="ortho")).float()
    torch.testing.assert_close(dct_matrix(size), expected)
