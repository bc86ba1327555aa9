"""Burgers' equation: a coarse solver, and trajectories of a fine one that it should have followed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from lightning_trust.datamodules.split_data_module import SplitDataModule, check_integer

Array = NDArray[np.float64]

#: Cells of the coarse grid, and viscosity.
CELLS, VISCOSITY = 32, 0.005
#: Time of a step of the coarse solver.
STEP = 0.02
#: Cells of the fine grid in one of the coarse grid, and steps of the fine solver in one of the coarse solver.
_FINER, _SUBSTEPS = 8, 16
_WAVES = 3


def burgers_step(states: Array, dt: float = STEP, viscosity: float = VISCOSITY) -> Array:
    r"""One step of a finite-volume solver of Burgers' equation, periodic on [0, 1).

    .. math:: \partial_t u + \partial_x \tfrac{u^2}{2} = \nu \, \partial_{xx} u, \qquad
        u_i \leftarrow u_i - \frac{\Delta t}{\Delta x} (f_{i + 1/2} - f_{i - 1/2}), \quad
        f_{i + 1/2} = \frac{u_i^2 + u_{i+1}^2}{4} - \frac{\max(|u_i|, |u_{i+1}|)}{2} (u_{i+1} - u_i)
        - \nu \frac{u_{i+1} - u_i}{\Delta x}

    with the flux of Rusanov, of first order: the mean of :math:`u` stays as it is, and waves are damped the more the
    wider cells are. It is stable for :math:`\Delta t \, (\max |u| / \Delta x + 2 \nu / \Delta x^2) \le 1`.

    Args:
        states: Means of the cells, shape ``(n, cells)``.
        dt: Time of the step.
        viscosity: Viscosity :math:`\nu`.

    Returns:
        The states after the step, of the same shape.

    Example:
        >>> state = np.array([[1.0, 0.0, 0.0, 0.0]])
        >>> after = burgers_step(state, dt=0.1, viscosity=0.0)
        >>> after.round(3), after.sum()
        (array([[0.6, 0.3, 0. , 0.1]]), np.float64(1.0))

    """
    width = 1.0 / states.shape[1]
    right = np.roll(states, -1, axis=1)
    speed = np.maximum(np.abs(states), np.abs(right))
    flux = (states**2 + right**2) / 4.0 - (speed / 2.0 + viscosity / width) * (right - states)
    after: Array = states - dt / width * (flux - np.roll(flux, 1, axis=1))
    return after


def burgers_trajectory(states: Array, steps: int) -> Array:
    """What the fine solver makes of fine states: shape ``(n, 1 + steps, cells)`` on the coarse grid, the start first.

    It has eight times the cells and sixteen times the steps of the coarse one, central fluxes that damp nothing but by
    viscosity, and steps of Runge and Kutta of third order (Shu and Osher's). On these states it is within 0.0001 of
    one with twice the cells, where the coarse solver is 0.02 away.

    Args:
        states: Means of the cells of the fine grid, shape ``(n, 8 * cells)``.
        steps: Number of coarse steps.

    """
    step = STEP / _SUBSTEPS
    found = [states]
    for _ in range(steps):
        for _ in range(_SUBSTEPS):
            first = states + step * _central_rate(states)
            second = 0.75 * states + 0.25 * (first + step * _central_rate(first))
            states = states / 3.0 + 2.0 / 3.0 * (second + step * _central_rate(second))
        found.append(states)
    fine = np.stack(found, axis=1)
    coarse: Array = fine.reshape(*fine.shape[:2], -1, _FINER).mean(axis=-1)
    return coarse


def _central_rate(states: Array) -> Array:
    """Time derivative of means of cells by central fluxes, of second order; the flux of u2/2 keeps the energy."""
    width = 1.0 / states.shape[1]
    right = np.roll(states, -1, axis=1)
    flux = (states**2 + states * right + right**2) / 6.0 - VISCOSITY / width * (right - states)
    rate: Array = (np.roll(flux, 1, axis=1) - flux) / width
    return rate


class BurgersDataModule(SplitDataModule):
    r"""Trajectories of Burgers' equation: from a state to those that follow, as a fine solver has them.

    Initial states are sums of three sines of random phase and normal amplitude that falls with the frequency, scaled to
    a random height in [0.5, 1]. They steepen into shocks, which :func:`burgers_step` on the coarse grid smears: what a
    correction has to find.

    A batch is ``[states, trajectories]``: states float32 ``(B, 32)``, trajectories float32 ``(B, T, 32)``, the states
    after 1, ..., T coarse steps. For training, trajectories of ``horizon`` steps are cut into windows of ``steps``
    steps, each of which is a row; validation and test have whole ones.

    Args:
        train_rows: Windows to train on.
        val_rows: Trajectories for validation.
        test_rows: Trajectories for the test; the same ones for a seed, whatever the others.
        steps: Steps of a window.
        horizon: Steps of a trajectory, a multiple of ``steps``.
        batch_size: Rows per batch.
        seed: Seed of the initial states.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> data = BurgersDataModule(train_rows=8, test_rows=2)
        >>> data.setup()
        >>> [part.shape for part in data.train_dataset[0]], [part.shape for part in data.test_dataset[0]]
        ([torch.Size([32]), torch.Size([8, 32])], [torch.Size([32]), torch.Size([32, 32])])

    """

    def __init__(
        self,
        train_rows: int = 256,
        val_rows: int = 16,
        test_rows: int = 64,
        steps: int = 8,
        horizon: int = 32,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("train_rows", train_rows, 1),
            ("val_rows", val_rows, 0),
            ("test_rows", test_rows, 1),
            ("steps", steps, 1),
            ("horizon", horizon, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            check_integer(name, value, least)
        if horizon % steps:
            raise ValueError(f"Expected argument `horizon` to be a multiple of steps={steps}, but got {horizon}.")
        self.train_rows = train_rows
        self.val_rows = val_rows
        self.test_rows = test_rows
        self.steps = steps
        self.horizon = horizon
        self.batch_size = batch_size
        self.seed = seed

    def _trajectories(self, part: int, count: int, steps: int) -> TensorDataset:
        """Rows of a part, cut into windows of so many steps."""
        windows = self.horizon // steps
        generator = np.random.default_rng([self.seed, part])
        states = _initial_states(-(-count // windows), generator)
        every = burgers_trajectory(states, self.horizon)
        starts = every[:, :-1:steps].reshape(-1, CELLS)[:count]
        rest = every[:, 1:].reshape(-1, steps, CELLS)[:count]
        return TensorDataset(torch.from_numpy(starts).float(), torch.from_numpy(rest).float())

    def setup(self, stage: str | None = None) -> None:
        """Solve the equation; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        self.train_dataset = self._trajectories(0, self.train_rows, self.steps)
        if self.val_rows:
            self.val_dataset = self._trajectories(1, self.val_rows, self.horizon)
        self.test_dataset = self._trajectories(2, self.test_rows, self.horizon)


def _initial_states(count: int, generator: np.random.Generator) -> Array:
    """Smooth states on the fine grid, their largest value in [0.5, 1]."""
    cells = CELLS * _FINER
    centres = (np.arange(cells) + 0.5) / cells
    states = np.zeros((count, cells))
    for wave in range(1, _WAVES + 1):
        amplitude = generator.normal(size=(count, 1)) / wave
        states += amplitude * np.sin(2.0 * np.pi * wave * centres + generator.uniform(0.0, 2.0 * np.pi, (count, 1)))
    states *= generator.uniform(0.5, 1.0, (count, 1)) / np.abs(states).max(axis=1, initial=1e-12, keepdims=True)
    return states
