"""A damped oscillator: noisy observations of its start, and a solver that goes on from its constants."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_trust.datamodules.split_data_module import SplitDataModule

Array = NDArray[np.float64]

#: When a trajectory is to be predicted.
TIMES = tuple(float(time) for time in np.linspace(2.5, 6.0, 8))
_OBSERVED = np.linspace(0.125, 2.0, 16)
#: Lowest and highest stiffness and damping.
LOWEST, HIGHEST = (1.0, 0.05), (4.0, 0.6)


def oscillator_trajectory(points: Array) -> Array:
    r"""Displacements of a damped oscillator at eight times, by a numerical solver.

    .. math:: \ddot x + c \dot x + k x = 0, \qquad x(0) = 1, \quad \dot x(0) = 0

    solved by ``scipy.integrate.solve_ivp`` (Dormand-Prince 8(5,3), relative tolerance 1e-8) for all rows at once, whose
    step is that of the stiffest row: answers depend on the other rows, as much as the tolerance lets them.

    Args:
        points: Stiffness :math:`k` and damping :math:`c`, shape ``(n, 2)``.

    Returns:
        Displacements at the times 2.5, 3.0, ..., 6.0, shape ``(n, 8)``.

    Example:
        >>> oscillator_trajectory(np.array([[1.0, 0.0]]))[0, :2].round(4)  # cos(2.5), cos(3)
        array([-0.8011, -0.99  ])

    """
    from scipy.integrate import solve_ivp

    stiffness, damping = points.T
    count = len(points)

    def slope(_: float, state: Array) -> Array:
        place, speed = state[:count], state[count:]
        return np.concatenate([speed, -damping * speed - stiffness * place])

    start = np.concatenate([np.ones(count), np.zeros(count)])
    solved = solve_ivp(slope, (0.0, TIMES[-1]), start, t_eval=TIMES, method="DOP853", rtol=1e-8, atol=1e-10)
    if not solved.success:
        raise RuntimeError(solved.message)
    found: Array = solved.y[:count]
    return found


class OscillatorDataModule(SplitDataModule):
    """Made data of damped oscillators: from 16 noisy observations of the start to 8 later displacements.

    Stiffness is uniform in [1, 4], damping in [0.05, 0.6]. An input is the displacement at the times 0.125, 0.25, ...,
    2, with normal noise; a target is that at the times 2.5, 3, ..., 6, without. With :func:`oscillator_trajectory` in
    the network, the two constants are what a network has to find.

    A batch is ``[inputs, targets]``: inputs float32 ``(B, 16)``, targets float32 ``(B, 8)``.

    Args:
        train_rows: Rows to train on.
        val_rows: Rows for validation.
        test_rows: Rows for the test; the same ones for a seed, whatever the others.
        noise: Standard deviation of the noise of an observation.
        batch_size: Rows per batch; all of them if None.
        seed: Seed of the data.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> data = OscillatorDataModule(train_rows=20)
        >>> data.setup()
        >>> [part.shape for part in data.train_dataset[0]]
        [torch.Size([16]), torch.Size([8])]

    """

    def __init__(
        self,
        train_rows: int = 50,
        val_rows: int = 0,
        test_rows: int = 200,
        noise: float = 0.05,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("train_rows", train_rows, 1),
            ("val_rows", val_rows, 0),
            ("test_rows", test_rows, 1),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        if not noise >= 0.0:
            raise ValueError(f"Expected argument `noise` to be at least 0, but got {noise}.")
        self.train_rows = train_rows
        self.val_rows = val_rows
        self.test_rows = test_rows
        self.noise = noise
        self.batch_size = batch_size
        self.seed = seed

    def constants(self, part: str) -> Tensor:
        """Stiffness and damping of the rows of ``"train"``, ``"val"`` or ``"test"``, float64 ``(n, 2)``."""
        sizes = {"test": self.test_rows, "val": self.val_rows, "train": self.train_rows}
        drawn = torch.rand(sizes[part], 2, generator=self._generator(part, 0), dtype=torch.float64)
        lowest, highest = (torch.tensor(bound, dtype=torch.float64) for bound in (LOWEST, HIGHEST))
        return lowest + (highest - lowest) * drawn

    def _generator(self, part: str, stream: int) -> torch.Generator:
        key = (3 * self.seed + ("train", "val", "test").index(part)) * 2 + stream
        return torch.Generator().manual_seed(key)

    def _rows(self, part: str) -> TensorDataset:
        constants = self.constants(part)
        seen = displacement(constants, torch.from_numpy(_OBSERVED))
        seen = seen + self.noise * torch.randn(seen.shape, generator=self._generator(part, 1), dtype=torch.float64)
        later = displacement(constants, torch.tensor(TIMES, dtype=torch.float64))
        return TensorDataset(seen.float(), later.float())

    def setup(self, stage: str | None = None) -> None:
        """Make the rows."""
        self.train_dataset, self.val_dataset, self.test_dataset = map(self._rows, ("train", "val", "test"))


def displacement(constants: Tensor, times: Tensor) -> Tensor:
    r"""Displacement of an underdamped oscillator in closed form, differentiable.

    .. math:: x(t) = e^{-c t / 2} \left(\cos \omega t + \frac{c}{2 \omega} \sin \omega t\right), \qquad
        \omega = \sqrt{k - c^2 / 4}

    Args:
        constants: Stiffness :math:`k` and damping :math:`c`, with :math:`c^2 < 4 k`; shape ``(n, 2)``.
        times: Shape ``(t,)``.

    Returns:
        Shape ``(n, t)``.

    """
    stiffness, damping = constants[:, :1], constants[:, 1:]
    omega = (stiffness - damping.square() / 4.0).sqrt()
    phase = omega * times
    return torch.exp(-damping / 2.0 * times) * (torch.cos(phase) + damping / (2.0 * omega) * torch.sin(phase))
