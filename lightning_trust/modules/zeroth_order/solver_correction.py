"""Training of a network that corrects a solver step by step."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError

from lightning_trust.core.hyperparameters import save_arguments
from lightning_trust.nn import BlackBoxLayer


class SolverCorrection(pl.LightningModule):
    r"""Solver in the loop: a network corrects a coarse solver after every step of a rollout.

    .. math:: s_{t+1} = P(s_t) + C_\theta(P(s_t)), \qquad
        \mathcal{L} = \frac{1}{T} \sum_{t=1}^{T} \lVert s_t - \bar s_t \rVert^2

    with :math:`\bar s` the trajectory that a fine solver gave, from the same start; the squared error is a mean over
    the entries of a state. What a correction does to later steps runs through the solver :math:`P`, which need not be
    differentiable. It is trained in one of these ways:

    - ``ZerothOrderGradient(CGE())`` in the callbacks: nothing is differentiated, and the solver is only asked forward
      (ZO-SOL; many questions, few weights);
    - without it, back-propagation runs through the network, and through the solver by the estimated product with its
      Jacobian (:class:`~lightning_trust.nn.BlackBoxLayer`), or exactly with ``BlackBoxLayer(..., direct=True)``;
    - ``interactive=False``: each step starts at a state of the trajectory (NON, not interacting). The solver needs no
      derivative, but the network never sees the states that its own corrections lead to.

    Logs ``train/loss`` and ``train/mae`` per step; ``val/loss``, ``val/mae``, and in the test ``test/mae``,
    ``test/mae_end``, that of the last step, and ``test/mae_solver``, that of the solver alone, per epoch, over whole
    rollouts.

    Papers: DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training (ICLR 2024, arXiv:2310.02025);
    Solver-in-the-Loop: Learning from Differentiable Physics to Interact with Iterative PDE-Solvers (NeurIPS 2020,
    arXiv:2007.00016).

    Shape:
        - Batch: ``[states, trajectories]``, floating point ``(B, n)`` and ``(B, T, n)``: states after 1, ..., T steps.
        - ``correction``: ``(B, n)`` -> ``(B, n)``.
        - ``forward``: states ``(B, n)`` and a number of steps -> ``(B, steps, n)``.
        - ``predict``: the rollout of a batch, ``(B, T, n)``.

    Args:
        solver: One step :math:`P` of the solver, with as many numbers out as in.
        correction: The network :math:`C_\theta`.
        interactive: Whether training goes through whole rollouts.
        optimizer: Called with the parameters, gives the optimizer. By default Adam with learning rate 1e-3.

    Raises:
        ValueError: If states and trajectories do not fit each other, or the correction gives another shape.
        MisconfigurationException: If the solver gives losses (``mode="loss"``), or leaves rows out
            (``on_failure="drop"``): a rollout goes on from every answer; or if it is no ``BlackBoxLayer``.

    Note:
        A checkpoint keeps no solver: ``load_from_checkpoint`` needs ``solver`` and ``correction`` again.

    Example:
        >>> from lightning_trust.nn import PeriodicConvNet
        >>> solver = BlackBoxLayer("lightning_trust.datamodules.burgers_step", out_dim=32)
        >>> SolverCorrection(solver, PeriodicConvNet())(torch.rand(2, 32), 8).shape
        torch.Size([2, 8, 32])

    """

    def __init__(
        self,
        solver: BlackBoxLayer,
        correction: nn.Module,
        interactive: bool = True,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
    ) -> None:
        super().__init__()
        if not isinstance(solver, BlackBoxLayer):
            raise MisconfigurationException(
                f"Expected a `solver` that is a BlackBoxLayer, but got {type(solver).__name__}. Wrap what takes and"
                " gives states: BlackBoxLayer(solver, out_dim=<numbers in a state>)."
            )
        if solver.mode == "loss":
            raise MisconfigurationException("Expected a `solver` that gives states, but got one with mode='loss'.")
        if solver.simulator is not None and solver.simulator.on_failure == "drop":
            raise MisconfigurationException(
                "A rollout goes on from every answer of the solver, but on_failure='drop' leaves some out. Pass"
                " on_failure='raise' or 'nearest'."
            )
        save_arguments(self, ["solver", "correction", "optimizer"])
        self.solver = solver
        self.correction = correction
        self.interactive = interactive
        self._make_optimizer = optimizer
        names = {"val": ("mae",), "test": ("mae", "mae_end", "mae_solver")}
        self.measures = nn.ModuleDict(
            {f"{part}_{name}": MeanAbsoluteError() for part, own in names.items() for name in own}
        )

    def forward(self, states: Tensor, steps: int) -> Tensor:
        """Roll out."""
        found = []
        for _ in range(steps):
            states = self._corrected(self.solver(states))
            found.append(states)
        return torch.stack(found, dim=1)

    def _corrected(self, states: Tensor) -> Tensor:
        correction = self.correction(states)
        if correction.shape != states.shape:
            raise ValueError(
                f"Expected `correction` to give the shape of the states, {tuple(states.shape)}, but got"
                f" {tuple(correction.shape)}."
            )
        return states + correction

    # -- steps ---------------------------------------------------------------------------------------------------------
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        states, trajectories = self._checked(batch)
        if self.interactive:
            found = self(states, trajectories.shape[1])
        else:
            starts = torch.cat([states.unsqueeze(1), trajectories[:, :-1]], dim=1).flatten(0, 1)
            found = self._corrected(self.solver.simulate(starts)).view_as(trajectories)
        loss = F.mse_loss(found, trajectories)
        self.log("train/loss", loss, batch_size=len(states))
        # squares of small errors are zeros in a progress bar
        self.log("train/mae", F.l1_loss(found.detach(), trajectories), prog_bar=True, batch_size=len(states))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/mae`` of rollouts."""
        states, trajectories = self._checked(batch)
        found = self(states, trajectories.shape[1])
        self.log("val/loss", F.mse_loss(found, trajectories), batch_size=len(states), sync_dist=True)
        self._measure("val", "mae", found, trajectories)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the errors of rollouts, and that of the solver alone."""
        states, trajectories = self._checked(batch)
        found = self(states, trajectories.shape[1])
        self._measure("test", "mae", found, trajectories)
        self._measure("test", "mae_end", found[:, -1], trajectories[:, -1])
        alone = []
        for _ in range(trajectories.shape[1]):
            states = self.solver.simulate(states)
            alone.append(states)
        self._measure("test", "mae_solver", torch.stack(alone, dim=1), trajectories)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Rollouts of a batch."""
        states, trajectories = self._checked(batch)
        return self(states, trajectories.shape[1])

    def _measure(self, part: str, name: str, found: Tensor, expected: Tensor) -> None:
        measure = self.measures[f"{part}_{name}"]
        measure.update(found.contiguous(), expected.contiguous())  # type: ignore[operator]
        self.log(f"{part}/{name}", measure, prog_bar=part == "val", on_step=False, on_epoch=True, batch_size=len(found))  # type: ignore[arg-type]

    def _checked(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        states, trajectories = batch
        if states.ndim != 2 or trajectories.ndim != 3 or trajectories[:, 0].shape != states.shape:
            raise ValueError(
                "Expected a batch of states (B, n) and trajectories (B, T, n), but got shapes"
                f" {tuple(states.shape)} and {tuple(trajectories.shape)}."
            )
        if states.shape[1] != self.solver.out_dim:
            raise ValueError(
                f"Expected states of {self.solver.out_dim} numbers, which are what the solver gives (`out_dim`), but"
                f" got {states.shape[1]}."
            )
        return states, trajectories

    def teardown(self, stage: str) -> None:
        """End the workers of the solver."""
        self.solver.close()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the correction."""
        return self._make_optimizer(self.parameters())
