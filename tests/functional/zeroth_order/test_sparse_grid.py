"""The sparse grid against NumPy's quadrature, moments of the normal and the weights that the paper's authors print."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_trust.functional.zeroth_order import count_grid_nodes, smolyak_gauss_hermite, smoothed_derivatives


def moment(power: int) -> float:
    """E z^power of a standard normal: 0, or the double factorial of power - 1."""
    return 0.0 if power % 2 else float(math.prod(range(1, power, 2)))


def smolyak_by_hand(dim: int, level: int) -> dict[tuple[float, ...], float]:
    """Every tensor product of the formula, node by node; none is left out, equal nodes are added up."""
    found: dict[tuple[float, ...], float] = {}
    for levels in itertools.product(range(1, level + 1), repeat=dim):
        missing = dim + level - 1 - sum(levels)
        if missing < 0 or missing > dim - 1:
            continue
        rules = [np.polynomial.hermite_e.hermegauss(each) for each in levels]
        factor = (-1) ** missing * math.comb(dim - 1, missing) / (2 * math.pi) ** (dim / 2)
        for picks in itertools.product(*(range(each) for each in levels)):
            key = tuple(round(float(rule[0][pick]), 9) + 0.0 for rule, pick in zip(rules, picks, strict=True))
            weight = factor * math.prod(float(rule[1][pick]) for rule, pick in zip(rules, picks, strict=True))
            found[key] = found.get(key, 0.0) + weight
    return {key: weight for key, weight in found.items() if abs(weight) > 1e-12}


@pytest.mark.parametrize(
    ("dim", "level"), [(1, 2), (1, 5), (2, 1), (2, 2), (2, 3), (2, 5), (3, 4), (4, 3), (5, 2), (3, 5)]
)
def test_nodes_and_weights_are_those_of_the_formula(dim, level):
    nodes, weights = smolyak_gauss_hermite(dim, level)
    expected = smolyak_by_hand(dim, level)
    got = {tuple(round(x, 9) + 0.0 for x in node): w for node, w in zip(nodes.tolist(), weights.tolist(), strict=True)}
    assert len(nodes) == len(got) == count_grid_nodes(dim, level)
    assert got.keys() == expected.keys()
    assert all(got[node] == pytest.approx(expected[node], abs=1e-12) for node in got)


def test_paper_grid_in_21_dimensions():
    nodes, weights = smolyak_gauss_hermite(21, 3)
    assert nodes.dtype == weights.dtype == torch.float64
    assert len(nodes) == 925
    one, two = nodes[:, 0], nodes[:, 7]
    for values, expected in ((1.0, 1.0), (one**2, 1.0), (one**4, 3.0), (one**2 * two**2, 1.0)):
        assert (weights * values).sum().item() == pytest.approx(expected, abs=1e-12)
    # centre, +-e_i, +-sqrt(3) e_i, +-e_i +- e_j
    kinds = {}
    for squares, weight in zip(nodes.square().sum(dim=1).tolist(), weights.tolist(), strict=True):
        kinds.setdefault(round(squares), set()).add(round(weight, 9))
    assert kinds == {0: {204.0}, 1: {-10.0}, 3: {round(1 / 6, 9)}, 2: {0.25}}
    assert weights.abs().sum().item() == pytest.approx(841.0)


@pytest.mark.parametrize(("dim", "nodes"), [(2, 13), (3, 25), (21, 925)])
def test_level_three_has_2d2_2d_1_nodes(dim, nodes):
    assert len(smolyak_gauss_hermite(dim, 3)[0]) == nodes == 2 * dim**2 + 2 * dim + 1


def test_one_dimension_is_gauss_hermite():
    nodes, weights = smolyak_gauss_hermite(1, 3)
    expected_nodes, expected_weights = np.polynomial.hermite_e.hermegauss(3)
    order = nodes[:, 0].argsort()
    np.testing.assert_allclose(nodes[order, 0].numpy(), expected_nodes, atol=1e-14)
    np.testing.assert_allclose(weights[order].numpy(), expected_weights / math.sqrt(2 * math.pi), atol=1e-14)


@pytest.mark.parametrize(("dim", "level"), [(2, 2), (3, 3), (3, 5), (6, 4)])
def test_exact_for_polynomials_of_degree_2l_minus_1(dim, level):
    nodes, weights = smolyak_gauss_hermite(dim, level)
    for powers in itertools.product(range(2 * level), repeat=dim):
        if sum(powers) < 2 * level:
            got = (weights * (nodes ** torch.tensor(powers)).prod(dim=1)).sum().item()
            assert got == pytest.approx(math.prod(map(moment, powers)), abs=1e-9), powers
    # and for no power of one dimension beyond
    got = (weights * nodes[:, 0] ** (2 * level)).sum().item()
    assert abs(got - moment(2 * level)) > 0.1


def test_mirror_images_weigh_the_same():
    nodes, weights = smolyak_gauss_hermite(4, 4)
    table = {tuple(node): weight for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True)}
    assert all(table[tuple(-x + 0.0 for x in node)] == weight for node, weight in table.items())


def derivatives(function, x, level=3, sigma=0.1):
    nodes, weights = smolyak_gauss_hermite(x.shape[1], level)
    return smoothed_derivatives(function(x[:, None] + sigma * nodes), nodes, weights, sigma)


def test_sum_of_squares():
    x = torch.rand(5, 21, dtype=torch.float64)
    value, gradient, second = derivatives(lambda z: z.square().sum(-1), x)
    torch.testing.assert_close(value, x.square().sum(1) + 21 * 0.01)
    torch.testing.assert_close(gradient, 2 * x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))


def test_sum_of_cubes_shows_the_bias_of_smoothing():
    x = torch.rand(5, 21, dtype=torch.float64)
    _, gradient, second = derivatives(lambda z: z.pow(3).sum(-1), x, sigma=0.3)
    torch.testing.assert_close(gradient, 3 * x**2 + 3 * 0.3**2)
    torch.testing.assert_close(second, 6 * x)


def test_product_wave_is_damped_as_a_normal_damps_it():
    x = torch.rand(4, 2, dtype=torch.float64)
    value, gradient, second = derivatives(lambda z: z.sin().prod(-1), x, level=5, sigma=0.2)
    damped = math.exp(-(0.2**2)) * x.sin().prod(1)
    torch.testing.assert_close(value, damped, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, damped[:, None] / x.tan(), rtol=0, atol=1e-7)
    torch.testing.assert_close(second, -damped[:, None].expand(-1, 2), rtol=0, atol=1e-5)


def test_nodes_of_every_points_own_and_a_reference():
    x = torch.rand(3, 2, dtype=torch.float64)
    half = torch.randn(3, 500, 2, dtype=torch.float64)
    nodes = torch.cat([half, -half], dim=1)
    weights = torch.full((1000,), 1e-3, dtype=torch.float64)

    def function(z):
        return (z**2 * torch.tensor([1.0, 3.0])).sum(-1) + z.prod(-1)

    f0 = function(x)
    got = smoothed_derivatives(function(x[:, None] + 0.1 * nodes), nodes, weights, 0.1, reference=f0)
    # the antithetic form of the paper, a point at a time
    for b in range(3):
        e = 0.1 * half[b]
        plus, minus = function(x[b] + e), function(x[b] - e)
        gradient = (e * (plus - minus)[:, None]).mean(0) / (2 * 0.1**2)
        second = ((e**2 - 0.1**2) * (plus + minus - 2 * f0[b])[:, None]).mean(0) / (2 * 0.1**4)
        torch.testing.assert_close(got.gradient[b], gradient)
        torch.testing.assert_close(got.second[b], second)
        torch.testing.assert_close(got.value[b], (plus + minus).mean() / 2)


@pytest.mark.parametrize("level", [0, 6, 2.5])
def test_level_out_of_range(level):
    with pytest.raises(ValueError, match=f"Expected argument `level` to be an integer from 1 to 5, but got {level}."):
        smolyak_gauss_hermite(2, level)


def test_bad_input():
    with pytest.raises(ValueError, match="Expected argument `dim` to be a positive integer, but got 0."):
        smolyak_gauss_hermite(0, 2)
    with pytest.raises(ValueError, match=r"at most 50000 nodes, but got dim=21 and level=5, which make .* Stein"):
        smolyak_gauss_hermite(21, 5)
    with pytest.raises(ValueError, match="Expected argument `sigma` to be positive, but got 0.0."):
        smoothed_derivatives(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), 0.0)
