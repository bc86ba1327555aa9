"""Burgers' equation: the solver against exact solutions, and the rows that are made with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

from lightning_trust.datamodules import BurgersDataModule, burgers_step, burgers_trajectory
from lightning_trust.datamodules.zeroth_order.burgers import STEP, VISCOSITY


def states(rows=3, cells=32, seed=0):
    centres = (np.arange(cells) + 0.5) / cells
    phases = np.random.default_rng(seed).uniform(0.0, 2.0 * np.pi, (rows, 1))
    return 0.6 * np.sin(2.0 * np.pi * centres + phases) + 0.2


def test_mean_is_kept_and_a_constant_does_not_change():
    before = states()
    after = burgers_step(before)
    np.testing.assert_allclose(after.mean(axis=1), before.mean(axis=1), rtol=0.0, atol=1e-15)
    assert np.abs(after - before).max() > 0.01
    constant = np.full((1, 16), 0.7)
    np.testing.assert_allclose(burgers_step(constant), constant, rtol=0.0, atol=1e-15)


def test_symmetries():
    # shifted states are solved alike, and u(-x) -> -u is a symmetry of the equation
    before = states()
    np.testing.assert_allclose(burgers_step(np.roll(before, 3, axis=1)), np.roll(burgers_step(before), 3, axis=1))
    np.testing.assert_allclose(burgers_step(-before[:, ::-1]), -burgers_step(before)[:, ::-1], atol=1e-15)


def test_small_steps_follow_the_same_fluxes_solved_by_scipy():
    start, count = states(rows=1, cells=24)[0], 24

    def slope(_, u):
        right = np.roll(u, -1)
        flux = 0.5 * (0.5 * u**2 + 0.5 * right**2) - 0.5 * np.maximum(abs(u), abs(right)) * (right - u)
        flux -= VISCOSITY * (right - u) * count
        return -(flux - np.roll(flux, 1)) * count

    expected = solve_ivp(slope, (0.0, 0.1), start, rtol=1e-9, atol=1e-11).y[:, -1]
    errors = []
    for steps in (50, 100):
        found = start[None]
        for _ in range(steps):
            found = burgers_step(found, dt=0.1 / steps)
        errors.append(np.abs(found[0] - expected).max())
    # explicit Euler: half the step, half the error
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)
    assert errors[1] < 2e-3


def exact(x, time, viscosity):
    """The solution that starts as sin(2 pi x), by the transformation of Cole and Hopf."""

    def weight(y):
        return np.exp(
            (np.cos(2.0 * np.pi * y) - 1.0) / (4.0 * np.pi * viscosity) - (x - y) ** 2 / (4 * viscosity * time)
        )

    reach = 12.0 * np.sqrt(viscosity * time)
    above = quad(lambda y: (x - y) / time * weight(y), x - reach, x + reach, epsabs=0.0, limit=200)[0]
    below = quad(weight, x - reach, x + reach, epsabs=0.0, limit=200)[0]
    return above / below


def test_finer_grids_come_to_the_exact_solution():
    time, viscosity = 0.1, 0.02
    errors = []
    for cells in (64, 128):
        edges = np.arange(cells) / cells
        # means of cells of sin(2 pi x)
        found = ((np.cos(2 * np.pi * edges) - np.cos(2 * np.pi * (edges + 1 / cells))) / (2 * np.pi) * cells)[None]
        steps = 4 * cells
        for _ in range(steps):
            found = burgers_step(found, dt=time / steps, viscosity=viscosity)
        centres = edges + 0.5 / cells
        errors.append(np.mean([abs(u - exact(x, time, viscosity)) for u, x in zip(found[0], centres, strict=True)]))
    # of first order
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.25)
    assert errors[1] < 0.02


def test_trajectories_start_at_the_states_and_come_to_the_exact_solution():
    edges = np.arange(256) / 256
    fine = ((np.cos(2 * np.pi * edges) - np.cos(2 * np.pi * (edges + 1 / 256))) / (2 * np.pi) * 256)[None]
    found = burgers_trajectory(fine, 8)
    assert found.shape == (1, 9, 32)
    np.testing.assert_allclose(found[:, 0], fine.reshape(1, 32, 8).mean(axis=2))
    np.testing.assert_allclose(found.mean(axis=2), 0.0, atol=1e-14)
    # means of cells by eight points each; at 0.16 the wave breaks
    points = (np.arange(32)[:, None] + (np.arange(8) + 0.5) / 8) / 32
    for steps in (2, 8):
        expected = [np.mean([exact(x, steps * STEP, VISCOSITY) for x in cell]) for cell in points]
        assert np.abs(found[0, steps] - expected).max() < 2e-3


def test_trajectories_are_converged():
    # the coarse solver is a hundred times as far from them
    centres = (np.arange(512) + 0.5) / 512
    finest = (0.6 * np.sin(2.0 * np.pi * centres) + 0.3 * np.cos(4.0 * np.pi * centres + 1.0))[None]
    found = burgers_trajectory(finest.reshape(1, 256, 2).mean(axis=2), 16)

    def slope(_, u):
        right = np.roll(u, -1)
        flux = (u**2 + u * right + right**2) / 6.0 - VISCOSITY * (right - u) * 512
        return -(flux - np.roll(flux, 1)) * 512

    solved = solve_ivp(slope, (0.0, 16 * STEP), finest[0], t_eval=[16 * STEP], rtol=1e-6, atol=1e-8)
    expected = solved.y[:, -1].reshape(32, 16).mean(axis=1)
    error = np.abs(found[0, -1] - expected).mean()
    coarse = finest.reshape(1, 32, 16).mean(axis=2)
    for _ in range(16):
        coarse = burgers_step(coarse)
    assert np.abs(coarse[0] - expected).mean() > 50 * error
    assert error < 5e-4


def test_windows_follow_one_another():
    data = BurgersDataModule(train_rows=7, val_rows=0, test_rows=2, steps=4, horizon=12)
    data.setup()
    first = data.train_dataset
    begins, windows = first[:]
    assert begins.shape == (7, 32)
    assert windows.shape == (7, 4, 32)
    # three windows a trajectory: each starts where the one before it ended
    for row in (0, 1, 3, 4):
        torch.testing.assert_close(begins[row + 1], windows[row, -1])
    assert not torch.allclose(begins[3], windows[2, -1])
    assert data.val_dataloader() == []
    assert data.test_dataset[0][1].shape == (12, 32)
    data.setup()
    assert data.train_dataset is first


def test_rows_are_those_of_the_seed_and_of_no_other_part():
    rows = []
    for seed, count in ((0, 8), (0, 16), (1, 8)):
        data = BurgersDataModule(train_rows=count, val_rows=2, test_rows=2, seed=seed)
        data.setup()
        rows.append([part[0][0] for part in (data.train_dataset, data.val_dataset, data.test_dataset)])
    # test rows do not depend on how many there are to train on
    torch.testing.assert_close(rows[0][2], rows[1][2])
    assert not torch.equal(rows[0][2], rows[2][2])
    assert not torch.equal(rows[0][0], rows[0][1])
    assert max(float(each.abs().max()) for each in rows[0]) <= 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 5}, "`horizon` to be a multiple of steps=5, but got 32"),
        ({"train_rows": 0}, "`train_rows` to be an integer of at least 1, but got 0"),
        ({"batch_size": 0}, "`batch_size` to be an integer of at least 1, but got 0"),
        ({"seed": -1}, "`seed` to be an integer of at least 0, but got -1"),
    ],
)
def test_bad_input(settings, words):
    with pytest.raises(ValueError, match=words):
        BurgersDataModule(**settings)
