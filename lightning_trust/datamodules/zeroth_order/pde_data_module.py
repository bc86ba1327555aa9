"""Points at which the residual of a partial differential equation is made small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from lightning_trust.core.distributed import rank, world_size
from lightning_trust.core.randomness import derived_seed
from lightning_trust.datamodules.zeroth_order.pde import PDEProblem


class CollocationPoints(Dataset[Tensor]):
    """Batches of points, of which item i is the batch of step i of the run.

    An item is drawn from a generator of its own, keyed by (seed, i), so that it is the same after a resume and in any
    worker process. Rank r of W takes the rows r::W of the draw for all ranks.

    Args:
        pde: The problem.
        rows: Points a batch.
        length: Number of batches in an epoch; items beyond it are there too, for later epochs.
        seed: Seed of the draws.
        part: Which rank, of how many.

    Example:
        >>> from lightning_trust.datamodules import Poisson
        >>> points = CollocationPoints(Poisson(2), rows=100, length=10)
        >>> len(points), points[12].shape, bool((points[12] == points[12]).all())
        (10, torch.Size([100, 2]), True)

    """

    def __init__(self, pde: PDEProblem, rows: int, length: int, seed: int = 0, part: tuple[int, int] = (0, 1)) -> None:
        self.pde = pde
        self.rows = rows
        self.length = length
        self.seed = seed
        self.part = part

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        here, ranks = self.part
        generator = Generator().manual_seed(derived_seed("collocation", self.seed, index))
        return self.pde.sample(self.rows * ranks, generator)[here::ranks]


class _Onward(DistributedSampler[int]):
    """Indices in order, going on from epoch to epoch, the same on all ranks.

    A distributed sampler of one rank, for Lightning puts one that shuffles in the place of any other kind.
    """

    def __init__(self, dataset: CollocationPoints) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self)
        return iter(range(start, start + len(self)))


class PDEDataModule(pl.LightningDataModule):
    """Fresh points for every step of training, and fixed ones, with exact values, for validation and test.

    All points are uniform in the box of the problem. A training batch is a tensor of points, float32
    ``(n_collocation, D)``. A batch of validation or test is ``[points, exact]``, exact values float64 ``(B,)``, or the
    points alone where the problem has no exact solution.

    Paper: Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks (arXiv 2308.09858).

    Args:
        pde: The problem.
        n_collocation: Points a step on each rank.
        steps_per_epoch: Steps after which an epoch ends, and validation comes.
        val_points: Number of points for validation; 0 for no validation.
        test_points: Number of points for test.
        eval_batch_size: Points of a batch of validation or test.
        seed: Seed of all points.
        num_workers: Worker processes of the training loader; points are drawn so fast that 0 is seldom slower.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> from lightning_trust.datamodules import Poisson
        >>> data = PDEDataModule(Poisson(2), n_collocation=8)
        >>> next(iter(data.train_dataloader())).shape
        torch.Size([8, 2])
        >>> points, exact = next(iter(data.test_dataloader()))
        >>> points.shape, exact.shape
        (torch.Size([100, 2]), torch.Size([100]))

    """

    def __init__(
        self,
        pde: PDEProblem,
        n_collocation: int = 100,
        steps_per_epoch: int = 100,
        val_points: int = 1000,
        test_points: int = 10_000,
        eval_batch_size: int = 100,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        numbers = {
            "n_collocation": (n_collocation, 1),
            "steps_per_epoch": (steps_per_epoch, 1),
            "val_points": (val_points, 0),
            "test_points": (test_points, 1),
            "eval_batch_size": (eval_batch_size, 1),
            "seed": (seed, 0),
            "num_workers": (num_workers, 0),
        }
        for name, (value, least) in numbers.items():
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Expected argument `{name}` to be an integer of at least {least}, but got {value}.")
        self.pde = pde
        self.n_collocation = n_collocation
        self.steps_per_epoch = steps_per_epoch
        self.val_points = val_points
        self.test_points = test_points
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Tensor]:
        """A batch of fresh points a step."""
        # ranks are known here, and not in worker processes
        part = (rank(), world_size())
        points = CollocationPoints(self.pde, self.n_collocation, self.steps_per_epoch, self.seed, part)
        return DataLoader(
            points,
            batch_size=None,
            sampler=_Onward(points),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches of the points for validation; no loader where there are none."""
        return self._fixed("validation", self.val_points) if self.val_points else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the points for test."""
        return self._fixed("test", self.test_points)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the points for test."""
        return self.test_dataloader()

    def _fixed(self, name: str, rows: int) -> DataLoader[Any]:
        points = self.pde.sample(rows, Generator().manual_seed(derived_seed(name, self.seed)))
        exact = [self.pde.exact(points.double())] if self.pde.has_exact else []
        return DataLoader(TensorDataset(points, *exact), batch_size=self.eval_batch_size)
