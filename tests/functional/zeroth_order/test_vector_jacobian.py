"""Vector-Jacobian estimates against closed forms: linear and quadratic boxes, bounds, missing answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_trust.functional.zeroth_order import coordinate_vjp, random_vjp

B, D, M = 4, 3, 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


A, OFFSET = draw(M, D, seed=1), draw(M, seed=2)
Z, V = draw(B, D, seed=3), draw(B, M, seed=4)


class Linear:
    """g(z) = A z + b, and what it was asked."""

    def __init__(self):
        self.points, self.rows = [], []

    def __call__(self, points, rows=None):
        if rows is not None:
            self.points.append(points.clone())
            self.rows.append(rows.clone())
        return points @ A.T + OFFSET

    @property
    def asked(self):
        return sum(map(len, self.points))


@pytest.mark.parametrize("mu", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("central", [True, False])
@pytest.mark.parametrize("scale", [None, torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)])
def test_coordinates_are_exact_for_a_linear_box(mu, central, scale):
    box = Linear()
    found = coordinate_vjp(box, Z, V, mu, base=None if central else box(Z), central=central, scale=scale)
    np.testing.assert_allclose(found.gradient.numpy(), V.numpy() @ A.numpy(), atol=1e-9)
    assert found.queries == box.asked == B * D * (2 if central else 1)
    assert found.one_sided == 0
    assert not found.missing.any()


def test_random_directions_are_right_in_the_mean_and_spread_as_the_formula_says():
    # one sample a draw: vector to scalar, then vector to vector
    draws, q = 100_000, 2
    truth = (V[0] @ A).numpy()
    z, v = Z[:1].expand(draws, D), V[:1].expand(draws, M)
    u = torch.randn(q, draws, D, generator=generator(5), dtype=torch.float64)
    for central in (True, False):
        box = Linear()
        estimates = random_vjp(box, z, v, u, 1e-2, base=box(z), central=central).gradient.numpy()
        error = estimates.std(axis=0) / np.sqrt(draws)
        assert np.all(np.abs(estimates.mean(axis=0) - truth) < 3.0 * error)
        expected = (D + 1) * np.square(truth).sum() / q
        square = np.square(estimates - truth).sum(axis=1)
        assert abs(square.mean() - expected) < 4.0 * square.std() / np.sqrt(draws)


def test_scale_changes_the_unit_and_not_the_mean():
    draws = 50_000
    scale = torch.tensor([0.01, 1.0, 5.0], dtype=torch.float64)
    z, v = Z[:1].expand(draws, D), V[:1].expand(draws, M)
    u = torch.randn(1, draws, D, generator=generator(6), dtype=torch.float64)
    estimates = random_vjp(Linear(), z, v, u, 1e-2, scale=scale).gradient
    by_hand = u[0] * ((scale * u[0]) @ A.T * v).sum(dim=1, keepdim=True) / scale
    torch.testing.assert_close(estimates, by_hand, rtol=1e-7, atol=1e-7)
    error = estimates.std(dim=0) / draws**0.5
    assert ((estimates.mean(dim=0) - V[0] @ A).abs() < 4.0 * error).all()


def quadratic():
    matrix = draw(D, D, seed=7)
    matrix = matrix + matrix.T
    return matrix, lambda points, rows=None: 0.5 * ((points @ matrix) * points).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("mu", [1e-3, 0.5, 4.0])
def test_a_quadratic_box(mu):
    matrix, box = quadratic()
    ones = torch.ones(B, 1, dtype=torch.float64)
    central = coordinate_vjp(box, Z, ones, mu).gradient
    torch.testing.assert_close(central, Z @ matrix, rtol=1e-8, atol=1e-8)
    one_sided = coordinate_vjp(box, Z, ones, mu, base=box(Z), central=False).gradient
    torch.testing.assert_close(one_sided - Z @ matrix, (mu * matrix.diag() / 2).expand(B, D), rtol=1e-7, atol=1e-8)


# -- the box -----------------------------------------------------------------------------------------------------------
LOW, HIGH = torch.zeros(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64)
INSIDE = torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.5, 1.0], [0.05, 0.97, 0.4], [1.0, 1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("central", [True, False])
@pytest.mark.parametrize("mu", [0.1, 3.0])
def test_no_point_leaves_the_box_and_coordinates_stay_exact(central, mu):
    box = Linear()
    found = coordinate_vjp(box, INSIDE, V, mu, base=box(INSIDE), central=central, bounds=(LOW, HIGH))
    points = torch.cat(box.points)
    assert ((points >= 0.0) & (points <= 1.0)).all()
    torch.testing.assert_close(found.gradient, V @ A, rtol=0.0, atol=1e-12)
    if central and mu == 0.1:
        # at 0, 1, 0.05, 0.97, 1, 1, 0: seven differences, each of which saves a point
        assert found.one_sided == 7
        assert found.queries == 2 * B * D - 7


@pytest.mark.parametrize("central", [True, False])
def test_random_directions_keep_their_mean_in_a_corner_of_the_box(central):
    draws, mu = 200_000, 0.02
    z = torch.tensor([[0.0, 1.0, 0.99]], dtype=torch.float64).expand(draws, D)
    v = V[:1].expand(draws, M)
    u = torch.randn(1, draws, D, generator=generator(8), dtype=torch.float64)
    box = Linear()
    found = random_vjp(box, z, v, u, mu, base=box(z), central=central, bounds=(LOW, HIGH))
    points = torch.cat(box.points)
    assert ((points >= 0.0) & (points <= 1.0)).all()
    error = found.gradient.std(dim=0) / draws**0.5
    assert ((found.gradient.mean(dim=0) - V[0] @ A).abs() < 4.0 * error).all()
    assert found.one_sided == (draws if central else 0)


# -- missing answers ---------------------------------------------------------------------------------------------------
def test_a_side_without_an_answer_is_replaced_by_the_middle():
    plain = Linear()

    def fails(points, rows):
        answers = plain(points)
        # sample 1 has no answer to the right of its middle, sample 2 none at all
        answers[(rows == 1) & (points > Z[rows]).any(dim=1)] = torch.nan
        answers[rows == 2] = torch.nan
        return answers

    found = coordinate_vjp(fails, Z, V, 0.1, base=plain(Z))
    expected = V @ A
    expected[2] = 0.0
    torch.testing.assert_close(found.gradient, expected)
    assert found.one_sided == D
    assert found.missing.tolist() == [0, 0, D, 0]
    # without the middle there is no difference either
    lost = coordinate_vjp(fails, Z, V, 0.1)
    assert lost.missing.tolist() == [0, D, D, 0]
    assert torch.equal(lost.gradient[1:3], torch.zeros(2, D, dtype=torch.float64))


def test_a_random_direction_without_an_answer_is_left_out_of_the_mean():
    plain, u = Linear(), torch.randn(3, B, D, generator=generator(9), dtype=torch.float64)
    first = Z + 0.1 * u[0]

    def fails(points, rows):
        answers = plain(points)
        near = torch.isclose(points, first[rows]).all(dim=1) | torch.isclose(points, 2 * Z[rows] - first[rows]).all(1)
        answers[near & (rows == 3)] = torch.nan
        return answers

    found = random_vjp(fails, Z, V, u, 0.1, base=plain(Z))
    assert found.missing.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(found.gradient[3], random_vjp(plain, Z, V, u[1:], 0.1).gradient[3])
    torch.testing.assert_close(found.gradient[:3], random_vjp(plain, Z, V, u, 0.1).gradient[:3])


# -- the rest ----------------------------------------------------------------------------------------------------------
def test_many_directions_are_asked_in_parts(monkeypatch):
    import lightning_trust.functional.zeroth_order.vector_jacobian as part

    whole = coordinate_vjp(Linear(), Z, V, 0.1)
    monkeypatch.setattr(part, "_NUMBERS", B * D)
    box = Linear()
    assert torch.equal(coordinate_vjp(box, Z, V, 0.1).gradient, whole.gradient)
    assert len(box.points) == D


def test_signal_to_noise():
    u = torch.randn(500, B, D, generator=generator(10), dtype=torch.float64)
    contributions = u * ((u @ A.T) * V).sum(dim=-1, keepdim=True)
    mean, variance = contributions.mean(dim=0), contributions.var(dim=0) / 500
    found = random_vjp(Linear(), Z, V, u, 0.1)
    assert found.snr == pytest.approx(float(mean.square().sum() / variance.sum()) - 1.0, rel=1e-8)
    assert found.snr == pytest.approx(500 / (D + 1), rel=0.2)
    assert np.isnan(random_vjp(Linear(), Z, V, u[:1], 0.1).snr)

    # noise alone
    def noise(points, rows):
        return torch.randn(len(points), M, generator=generator(11), dtype=torch.float64)

    z, v = draw(500, D, seed=12), draw(500, M, seed=13)
    assert random_vjp(noise, z, v, draw(4, 500, D, seed=14), 0.1).snr < 0.1


def test_bad_input():
    with pytest.raises(ValueError, match="`mu` to be positive, but got 0"):
        coordinate_vjp(Linear(), Z, V, 0.0)
    with pytest.raises(ValueError, match="`base` to hold the values"):
        random_vjp(Linear(), Z, V, Z[None], 0.1, central=False)
    with pytest.raises(ValueError, match=r"`mu` to move every coordinate, but with 1e-12 .* of torch.float32"):
        coordinate_vjp(lambda points, rows: points, Z.float() + 1.0, Z, 1e-12)
