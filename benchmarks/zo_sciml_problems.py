"""Problems with a simulator, for the small experiments of zeroth-order SciML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import MLP

from lightning_trust.datamodules import (
    ElementDensityDataModule,
    OscillatorDataModule,
    crystal_density,
    oscillator_trajectory,
)
from lightning_trust.datamodules.zeroth_order.element_density import _ATOMS, _UNIT, _VOLUME
from lightning_trust.datamodules.zeroth_order.oscillator import HIGHEST, LOWEST, TIMES, displacement

WIDTH = 32


def density_twin(points: Tensor) -> Tensor:
    """:func:`crystal_density` as differentiable code."""
    code = points[:, 2].long()
    atoms, volume = (torch.as_tensor(table, dtype=points.dtype) for table in (_ATOMS, _VOLUME))
    return (_UNIT * atoms[code] * points[:, 1] / (volume[code] * points[:, 0] ** 3)).unsqueeze(1)


def trajectory_twin(points: Tensor) -> Tensor:
    """:func:`oscillator_trajectory` in closed form."""
    return displacement(points, torch.tensor(TIMES, dtype=points.dtype))


@dataclass
class Problem:
    """One training and test set, and the simulator that belongs to them."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    known: tuple[int, ...]
    simulator: Callable[[np.ndarray], np.ndarray]
    twin: Callable[[Tensor], Tensor]
    bounds: tuple[Any, Any]
    dim: int
    #: what errors are multiplied with in tables
    unit: float = 1.0

    @property
    def out_dim(self) -> int:
        return self.train[1].shape[1]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What networks see, and what the simulator takes as it is."""
        others = [column for column in range(x.shape[1]) if column not in self.known]
        return x[:, others], x[:, list(self.known)]

    def box(self) -> tuple[Tensor, Tensor]:
        low, high = (torch.as_tensor(bound, dtype=torch.float32).expand(self.dim) for bound in self.bounds)
        return low, high

    def ask(self, z: Tensor, known: Tensor) -> Tensor:
        points = torch.cat([z, known], dim=1).double().numpy()
        return torch.from_numpy(np.asarray(self.simulator(points))).float()

    def inputs(self, encoded: Tensor) -> Tensor:
        """Inputs of the simulator, within its bounds, as BlackBoxLayer makes them."""
        low, high = self.box()
        return low + (high - low) * encoded.sigmoid()

    def predictor(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        """Predictions of the simulator itself, whatever stood in for it in training."""

        @torch.no_grad()
        def predict(x: Tensor) -> Tensor:
            seen, known = self.split(x)
            return self.ask(self.inputs(net(seen)), known)

        return predict


def elements(fraction: float, seed: int, fold: int, validate: bool = False) -> Problem:
    data = ElementDensityDataModule(fold=fold, train_fraction=fraction, seed=seed)
    data.setup()
    train = data.train_dataset.tensors
    test = data.test_dataset.tensors
    if validate:
        # the next fold's place in the training rows: what is left of all elements is not looked at
        third = max(2, len(train[0]) // 3)
        train, test = tuple(part[third:] for part in train), tuple(part[:third] for part in train)
    return Problem(train, test, data.known, crystal_density, density_twin, (2.0, 7.0), 1)


def oscillator(count: int, seed: int, fold: int = 0, validate: bool = False) -> Problem:
    data = OscillatorDataModule(train_rows=count, val_rows=100, seed=seed)
    data.setup()
    test = (data.val_dataset if validate else data.test_dataset).tensors
    bounds = (list(LOWEST), list(HIGHEST))
    return Problem(data.train_dataset.tensors, test, (), oscillator_trajectory, trajectory_twin, bounds, 2, 100.0)


# -- training ----------------------------------------------------------------------------------------------------------
@dataclass
class Fitted:
    """What came of a method."""

    predict: Callable[[Tensor], Tensor]
    queries: int = 0
    failures: int = 0
    cosines: list[float] = field(default_factory=list)


def encoder(problem: Problem, outputs: int, seed: int) -> MLP:
    torch.manual_seed(seed)
    inputs = problem.split(problem.train[0])[0].shape[1]
    return MLP(inputs, [WIDTH, WIDTH, outputs], activation_layer=nn.Tanh, inplace=None)


def fit(module: nn.Module, loss: Callable[[], Tensor], rate: float, steps: int, watch: Any = None) -> None:
    """Adam on whole batches; ``watch`` is called now and then between backward pass and step."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss().backward()
        if watch is not None and step % 50 == 0:
            watch()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
