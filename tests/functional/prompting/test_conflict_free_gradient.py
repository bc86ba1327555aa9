"""The rule of the update against its formula, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trust.functional.prompting import conflict_free_gradient


def gradients(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 4), (7,), ())
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("lmbda", [0.0, 0.05, 20.0])
@pytest.mark.parametrize("scale", [1.0, 1e-200])
def test_component_along_the_adversary_is_its_weight_alone(lmbda, scale):
    utility, adversary = gradients(1), gradients(2, scale)
    for found, g_u, g_a in zip(conflict_free_gradient(utility, adversary, lmbda), utility, adversary, strict=True):
        norm = float(np.sqrt((np.asarray(g_a / scale) ** 2).sum()))
        u = np.asarray(g_a / scale) / norm
        assert float((found.numpy() * u).sum()) == pytest.approx(-lmbda * norm * scale, abs=1e-12)
        expected = g_u.numpy() - (g_u.numpy() * u).sum() * u - lmbda * g_a.numpy()
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_without_weight_it_is_orthogonal_to_the_adversary():
    utility, adversary = gradients(3), gradients(4)
    for found, g_a in zip(conflict_free_gradient(utility, adversary, 0.0), adversary, strict=True):
        assert float((found * g_a).sum()) == pytest.approx(0.0, abs=1e-12)


def test_without_a_direction_it_is_the_own_gradient():
    utility = gradients(5)
    nothing = [torch.zeros_like(gradient) for gradient in utility]
    for found, own in zip(conflict_free_gradient(utility, nothing, 5.0), utility, strict=True):
        assert torch.equal(found, own)


def test_without_projection_it_is_a_difference():
    utility, adversary = gradients(6), gradients(7)
    found = conflict_free_gradient(utility, adversary, 0.5, project=False)
    for each, own, other in zip(found, utility, adversary, strict=True):
        assert torch.equal(each, own - 0.5 * other)


def test_every_tensor_by_itself():
    first, second = (torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]))
    found = conflict_free_gradient([first, second], [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], 0.0)
    assert [each.tolist() for each in found] == [[0.0, 1.0], [2.0, 0.0]]


def test_bad_input():
    with pytest.raises(ValueError, match="`lmbda` to be at least 0, but got -1"):
        conflict_free_gradient([torch.ones(1)], [torch.ones(1)], -1.0)
    with pytest.raises(ValueError, match=r"same shapes, but got \[\(1,\)\] and \[\(2,\)\]"):
        conflict_free_gradient([torch.ones(1)], [torch.ones(2)], 1.0)
