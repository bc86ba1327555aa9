"""Physics-informed training: a network that solves a partial differential equation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from lightning_trust.core.hyperparameters import save_arguments
from lightning_trust.datamodules import PDEDataModule, PDEProblem
from lightning_trust.metrics import RelativeL2
from lightning_trust.nn import DerivativeEstimator, SparseGridDerivatives

# Points at which a validation compares levels of sparse grids
_COMPARED = 4


class PINNModule(pl.LightningModule):
    r"""Training of a network to solve a partial differential equation.

    The loss is the mean square of the residual :math:`R` at the points of a batch; initial and boundary conditions hold
    by construction of the lift :math:`u` (see :class:`~lightning_trust.datamodules.PDEProblem`):

    .. math:: L = \frac1B \sum_b R\big(x_b; u, \nabla u, \partial_1^2 u, \dots, \partial_D^2 u\big)^2

    Values and derivatives of :math:`u` come from the estimator; with any but
    :class:`~lightning_trust.nn.AutogradDerivatives` a step makes no use of automatic differentiation in the inputs, and
    none at all under zeroth-order training. A repeated evaluation of a step repeats its random draws. The network runs
    in its own precision, float32 or float64, and never under autocast; the lift, differences and sums are in float64.

    Logs ``train/loss`` and ``train/evaluations`` (network evaluations so far, on this rank) per step;
    ``val/loss``, ``val/rel_l2`` (error of the network itself) and ``val/rel_l2_smoothed`` (of the smoothed network,
    where the estimator smooths, as the paper reports it) per epoch, and the same for ``test``. ``predict`` gives the
    values of the solution, ``(B,)``. A validation warns where sparse grids of two levels disagree, or where there is no
    other level to compare with.

    Without a data module it brings its own points, a :class:`~lightning_trust.datamodules.PDEDataModule`.

    Paper: Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks (arXiv 2308.09858).

    Shape:
        - Batch: points ``(B, D)``; for validation and test ``[points, exact values]``.
        - ``forward``: points ``(B, D)`` -> values of the solution ``(B,)``.

    Args:
        net: The network: points ``(B, D)`` -> ``(B, 1)``.
        pde: The problem.
        derivatives: The estimator of derivatives.
        n_collocation: Points a step on each rank; not looked at where a data module is given.
        optimizer: Called with the parameters, gives the optimizer. By default Adam with learning rate 1e-3.
        lr_scheduler: Called with the optimizer, gives a scheduler, which is stepped every step; None for a constant
            learning rate.
        relative_l2: Whether validation and test measure the distance from the exact solution.

    Attributes:
        net: The network; it holds all parameters.

    Raises:
        ValueError: If ``n_collocation`` is below 1.
        MisconfigurationException: If the network has dropout or batch normalisation, under which the points of a grid
            are not values of one function; or if ``relative_l2`` is asked for and the solution is not known.

    Note:
        A checkpoint keeps what is plain data among the arguments, so ``load_from_checkpoint`` needs ``net``, ``pde``
        and ``derivatives`` again. Under LightningCLI it keeps all.

    Example:
        >>> import torch
        >>> from lightning_trust.datamodules import HJB20
        >>> from lightning_trust.nn import SineMLP, SparseGridDerivatives
        >>> pinn = PINNModule(SineMLP(21, 32), HJB20(), SparseGridDerivatives(21))
        >>> pinn(torch.ones(2, 21)).tolist()  # at t = 1 the solution is the sum of the other coordinates
        [20.0, 20.0]

    """

    def __init__(
        self,
        net: nn.Module,
        pde: PDEProblem,
        derivatives: DerivativeEstimator,
        n_collocation: int = 100,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        relative_l2: bool = True,
    ) -> None:
        super().__init__()
        for name, layer in net.named_modules():
            if isinstance(layer, _BatchNorm) or (isinstance(layer, _DropoutNd) and layer.p > 0.0):
                raise MisconfigurationException(
                    "Derivatives come from many values of one function, so argument `net` may not hold dropout or batch"
                    f" normalisation, but got {type(layer).__name__} as '{name}'."
                )
        if relative_l2 and not pde.has_exact:
            raise MisconfigurationException(
                f"relative_l2=True needs the exact solution, but {type(pde).__name__} has none. Pass relative_l2=False."
            )
        save_arguments(self, ["net", "pde", "derivatives", "optimizer", "lr_scheduler"])
        self.net = net
        self.pde = pde
        self.derivatives = derivatives
        self.relative_l2 = relative_l2
        self._make_optimizer = optimizer
        self._make_scheduler = lr_scheduler
        self._points = PDEDataModule(pde, n_collocation)
        self._warned = False
        if relative_l2:
            self.val_rel_l2, self.val_rel_l2_smoothed = RelativeL2(), RelativeL2()
            self.test_rel_l2, self.test_rel_l2_smoothed = RelativeL2(), RelativeL2()

    def forward(self, x: Tensor) -> Tensor:
        """Points ``(B, D)`` -> values of the solution ``(B,)``."""
        self._check(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._solution(x.double()).to(x.dtype)

    def residual(self, x: Tensor, key: int | None = None) -> Tensor:
        """The residual at points ``(B, D)``, float64 of shape ``(B,)``.

        Args:
            x: The points.
            key: Places the draws of a random estimator; by default they are new in every call.

        """
        return self._looked_at(x, key)[0]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean square of the residual."""
        loss = self.residual(batch, self.trainer.fit_loop.total_batch_idx).square().mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/evaluations", float(self.derivatives.evaluations), batch_size=len(batch))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val/loss`` and the errors."""
        self._evaluate(batch, batch_idx, "val")
        if batch_idx == 0 and self.trainer.is_global_zero and not self._warned:
            self._compare_levels(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``test/loss`` and the errors."""
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Values of the solution ``(B,)``."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the scheduler where there is one."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Fresh points every step, where no data module is given."""
        return self._points.train_dataloader()

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Points for validation, where no data module is given."""
        return self._points.val_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Points for test, where no data module is given."""
        return self._points.test_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Points for test, where no data module is given."""
        return self._points.predict_dataloader()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how much the estimator was asked."""
        checkpoint["derivatives"] = {"calls": self.derivatives.calls, "evaluations": self.derivatives.evaluations}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        for name, value in checkpoint["derivatives"].items():
            setattr(self.derivatives, name, value)

    # -- parts ---------------------------------------------------------------------------------------------------------
    def _network(self, x: Tensor) -> Tensor:
        """Values ``(B,)`` of the network alone, in the type of the points."""
        dtype = next((p.dtype for p in self.net.parameters()), x.dtype)
        if dtype not in (torch.float32, torch.float64):
            raise MisconfigurationException(
                "Residuals of a differential equation need a network in float32 or float64, but its parameters are"
                f" {dtype}. Use a `precision` of '32-true', '64-true' or a mixed one."
            )
        values = self.net(x.to(dtype))
        if values.numel() != len(x):
            raise ValueError(
                f"Expected argument `net` to map points {tuple(x.shape)} to ({len(x)}, 1), but got"
                f" {tuple(values.shape)}."
            )
        return values.reshape(-1).to(x.dtype)

    def _solution(self, x: Tensor) -> Tensor:
        return self.pde.lift(x, self._network)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.pde.num_coordinates:
            raise ValueError(
                f"Expected points of shape (B, {self.pde.num_coordinates}) for {type(self.pde).__name__}, but got"
                f" {tuple(x.shape)}."
            )

    def _looked_at(self, x: Tensor, key: int | None) -> tuple[Tensor, Tensor]:
        """Residuals, and values of the solution whose derivatives they are of."""
        self._check(x)
        with torch.autocast(x.device.type, enabled=False):
            # in float32 what the lift adds to the network is rounded, which a grid makes thousands of times larger
            points = x.double()
            found = self.derivatives(self._solution, points, key)
            return self.pde.residual(points, found), found.value

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        points, exact = (batch, None) if isinstance(batch, Tensor) else (batch[0], *batch[1:], None)[:2]
        residual, smoothed = self._looked_at(points, batch_idx)
        rows = len(points)
        self.log(f"{stage}/loss", residual.square().mean(), batch_size=rows, sync_dist=True)
        if not self.relative_l2:
            return
        if exact is None:
            raise MisconfigurationException(
                "relative_l2=True needs batches [points, exact values] in validation and test, but got points alone."
            )
        errors = {"rel_l2": self(points.double()), "rel_l2_smoothed": smoothed}
        for name, values in errors.items():
            metric: RelativeL2 = getattr(self, f"{stage}_{name}")
            metric.update(values, exact)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "rel_l2", batch_size=rows)

    def _compare_levels(self, points: Tensor) -> None:
        estimator = self.derivatives
        if not isinstance(estimator, SparseGridDerivatives):
            return
        if estimator.other_level() is None:
            self._warned = True
            rank_zero_warn(
                f"The sparse grid of level {estimator.level} in {estimator.dim} dimensions cannot be compared with one"
                " of another level, which would be too large: nothing tells whether it suffices. Look at the error"
                " where the solution is known, or compare with SteinDerivatives."
            )
            return
        tolerance = 0.1
        some = points[:_COMPARED].double()
        with torch.autocast(points.device.type, enabled=False):
            self._warned = estimator.compare_levels(self._solution, some, tolerance) > tolerance
