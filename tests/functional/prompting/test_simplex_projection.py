"""Projection onto the simplex against one that sorts, and against its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trust.functional.prompting import project_to_simplex


def by_sorting(row):
    """Duchi et al., Efficient Projections onto the l1-Ball (ICML 2008), figure 1."""
    mu = np.sort(row)[::-1]
    below = (np.cumsum(mu) - 1.0) / np.arange(1, len(row) + 1)
    rho = np.nonzero(mu > below)[0].max()
    return np.maximum(row - below[rho], 0.0)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("length", [1, 2, 7, 3000])
def test_equals_a_projection_that_sorts(scale, length):
    generator = torch.Generator().manual_seed(length)
    values = scale * torch.randn(4, length, generator=generator)
    found = project_to_simplex(values)
    expected = np.stack([by_sorting(row) for row in values.double().numpy()])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5 * max(1.0, scale))
    assert (found >= 0.0).all()
    assert (found <= 1.0).all()
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(4), atol=1e-4, rtol=0.0)


def test_is_idempotent_and_leaves_one_hots_alone():
    values = torch.randn(5, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = project_to_simplex(values)
    torch.testing.assert_close(project_to_simplex(once), once, atol=1e-12, rtol=0.0)
    one_hots = torch.eye(50)
    assert torch.equal(project_to_simplex(one_hots), one_hots)


def test_rows_whose_sum_is_below_one_are_moved_too():
    assert torch.equal(project_to_simplex(torch.zeros(2, 4)), torch.full((2, 4), 0.25))
    half = project_to_simplex(torch.full((1, 4), 0.2, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.tolist() == [[0.25] * 4]
