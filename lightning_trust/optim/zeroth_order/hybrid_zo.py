"""Random directions first, coordinates later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.optimizer import ParamsT

from lightning_trust.core.distributed import mean_over_ranks
from lightning_trust.functional.zeroth_order import Distribution
from lightning_trust.optim.layers import check_range
from lightning_trust.optim.zeroth_order.cge import CGE
from lightning_trust.optim.zeroth_order.coordinate_trials import CoordinateTrials, drop_coordinates
from lightning_trust.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle, check_count
from lightning_trust.optim.zeroth_order.rge import RGE

Phase = Literal["random", "coordinates"]
Switch = Literal["plateau", "epoch"]
CoordinateRule = Literal["estimate", "sign", "batch"]


class HybridZO(ZerothOrderOptimizer):
    r"""Hybrid zeroth-order training: cheap random gradient estimates first, coordinate-wise ones once these stagnate.

    .. math:: \theta \leftarrow \theta - \eta \, \mathrm{sign}(\hat g_{\mathrm{RGE}})
        \quad\text{and later}\quad v \leftarrow m v + \hat g_{\mathrm{CGE}}, \quad \theta \leftarrow \theta - \eta' v

    A random estimate takes :math:`2 q` queries and has an error of :math:`(d + 1) / q` times the squared length of the
    gradient, whatever the weights; a coordinate-wise one takes :math:`2 d` and has none but of curvature. Where the
    weights are in tensor-train form (:func:`lightning_trust.nn.tensorize`) their number :math:`d` is small enough for
    the second to finish what the first began.

    The phases change for good, under ``switch="plateau"`` when ``patience`` values in a row were no better than the
    best before them. A value is the mean loss of ``window`` steps; or, with ``monitor``, what :meth:`report` is told:
    the callback ``ZerothOrderGradient`` reports the metric of that name after each validation. Under ``"epoch"`` they
    change when epoch ``switch_epoch`` begins, which :meth:`begin_epoch` is told, by the callback or by you.

    A scheduler that multiplies ``lr`` multiplies ``coordinate_lr`` alike; the paper's code has
    ``ExponentialLR(gamma=0.8)``. In a Trainer it runs under the callback ``ZerothOrderGradient()``.

    Paper: Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks (arXiv 2308.09858).

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate :math:`\eta` of random estimates, positive.
        mu: Length of a difference, in both phases.
        q: Number of random directions a step.
        sign_first: Whether the first phase takes the sign of the estimate.
        distribution: What random directions are drawn from: ``"normal"``, ``"rademacher"`` or ``"sphere"``.
        switch: ``"plateau"`` or ``"epoch"``.
        patience: Number of values without an improvement after which the phases change; never if None.
        window: Number of steps whose mean loss is a value.
        monitor: Name of a logged metric, the lower the better, whose values are looked at in place of the losses.
        switch_epoch: Epoch that the second phase begins with, from 0.
        rule: What the second phase is: ``"estimate"``, or ``"sign"`` or ``"batch"``, the steps of :class:`SignSCD` of
            length ``coordinate_lr``.
        coordinate_lr: Learning rate :math:`\eta'` of the second phase, positive.
        coordinate_dropout: Probability with which a coordinate is left out of a step, in [0, 1).
        momentum: Momentum :math:`m` of the second phase under ``rule="estimate"``, in [0, 1).
        coordinates: Estimates the gradient in the second phase; ``CGE(mu, central=True)`` if None.
        module: The network, for many coordinates to be evaluated at a time.
        seed: Seed of the directions; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: In a step, if the phases change with an epoch and nothing told of one.

    Example:
        >>> weight = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
        >>> optimizer = HybridZO([weight], lr=0.05, mu=0.01, window=5, patience=2, coordinate_lr=0.05)
        >>> phases = []
        >>> for _ in range(250):
        ...     loss = optimizer.step(lambda: weight.square().sum())
        ...     phases.append(optimizer.phase)
        >>> phases[0], phases[-1], bool(weight.detach().norm() < 1e-2)
        ('random', 'coordinates', True)

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 5e-3,
        mu: float = 0.1,
        q: int = 10,
        sign_first: bool = True,
        distribution: Distribution = "normal",
        switch: Switch = "plateau",
        patience: int | None = 5,
        window: int = 100,
        monitor: str | None = None,
        switch_epoch: int = 10,
        rule: CoordinateRule = "estimate",
        coordinate_lr: float = 1e-3,
        coordinate_dropout: float = 0.5,
        momentum: float = 0.9,
        coordinates: CGE | None = None,
        module: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        for name, rate in (("lr", lr), ("coordinate_lr", coordinate_lr)):
            if not (rate > 0.0 and math.isfinite(rate)):
                raise ValueError(f"Expected argument `{name}` to be a positive number, but got {rate}.")
        if switch not in get_args(Switch):
            raise ValueError(f"Expected argument `switch` to be 'plateau' or 'epoch', but got {switch!r}.")
        if rule not in get_args(CoordinateRule):
            raise ValueError(
                f"Expected argument `rule` to be one of {list(get_args(CoordinateRule))}, but got {rule!r}."
            )
        if monitor is not None and switch != "plateau":
            raise ValueError(f"Expected argument `monitor` to be None under switch='epoch', but got {monitor!r}.")
        if coordinates is not None and rule != "estimate":
            raise ValueError(
                f"Expected argument `coordinates` to be None under rule={rule!r}, but got {coordinates!r}."
            )
        if isinstance(switch_epoch, bool) or not isinstance(switch_epoch, int) or switch_epoch < 0:
            raise ValueError(
                f"Expected argument `switch_epoch` to be an integer of at least 0, but got {switch_epoch!r}."
            )
        check_count("window", window)
        if patience is not None:
            check_count("patience", patience)
        check_range("coordinate_dropout", coordinate_dropout, high=1.0)
        check_range("momentum", momentum, high=1.0)
        self.random = RGE(q, mu, distribution=distribution, exact_restore=True)
        self.coordinates = coordinates or CGE(mu, central=True)
        self.trials = None if rule == "estimate" else CoordinateTrials(rule, stp=True)
        first = switch == "epoch" and switch_epoch == 0
        # what a resumed run goes on with; in the groups, which a state dict keeps
        progress = {
            "phase": "coordinates" if first else "random",
            "best": math.inf,
            "without_improvement": 0,
            "loss_sum": 0.0,
            "losses": 0,
            "epoch": None,
        }
        settings = {"lr": lr, "coordinate_lr": coordinate_lr, "momentum": momentum}
        super().__init__(params, {**settings, "constant_lr": lr, **progress}, module, seed)
        for group in self.param_groups:
            # a group may have a rate of its own
            group["constant_lr"] = group["lr"]
        self.sign_first = sign_first
        self.switch: Switch = switch
        self.patience = patience
        self.window = window
        self.monitor = monitor
        self.switch_epoch = switch_epoch
        self.coordinate_dropout = coordinate_dropout

    # -- phases --------------------------------------------------------------------------------------------------------
    @property
    def phase(self) -> Phase:
        """``"random"`` or ``"coordinates"``."""
        phase: Phase = self.param_groups[0]["phase"]
        return phase

    def begin_epoch(self, epoch: int) -> None:
        """Tell which epoch begins, from 0."""
        self._keep(epoch=epoch)
        if self.switch == "epoch" and epoch >= self.switch_epoch:
            self._keep(phase="coordinates")

    def look_at(self, metrics: Mapping[str, Any]) -> None:
        """Take what is monitored from what a validation logged.

        Raises:
            MisconfigurationException: If it is not there.

        """
        if self.monitor is None:
            return
        if self.monitor not in metrics:
            raise MisconfigurationException(
                f"HybridZO has monitor='{self.monitor}', but a validation logged {sorted(metrics)}. Log it, or leave"
                " `monitor` out."
            )
        self.report(float(metrics[self.monitor]))

    def report(self, value: float) -> None:
        """Tell a value of what is monitored, the lower the better; call it on all ranks, whose mean it is then."""
        device = self.param_groups[0]["params"][0].device
        self._look_at(float(mean_over_ranks(torch.tensor(float(value), device=device))))

    def _look_at(self, value: float) -> None:
        if self.switch != "plateau" or self.phase != "random":
            return
        state = self.param_groups[0]
        if value < state["best"]:
            self._keep(best=value, without_improvement=0)
            return
        self._keep(without_improvement=state["without_improvement"] + 1)
        if self.patience is not None and state["without_improvement"] >= self.patience:
            self._keep(phase="coordinates")

    def _note_loss(self, oracle: LossOracle, estimate: Estimate) -> Estimate:
        """Look at the mean loss of a window of steps."""
        # ranks that have no query of their own have no loss of one either
        loss = oracle.base() if oracle.splits else estimate.loss
        oracle.bytes_sent += loss.element_size()
        state = self.param_groups[0]
        # each step's mean over the ranks: sums of their own would not survive a checkpoint of one of them
        self._keep(loss_sum=state["loss_sum"] + float(mean_over_ranks(loss)), losses=state["losses"] + 1)
        if state["losses"] == self.window:
            mean = state["loss_sum"] / self.window
            self._keep(loss_sum=0.0, losses=0)
            self._look_at(mean)
        return replace(estimate, bytes_sent=oracle.bytes_sent)

    def _keep(self, **progress: Any) -> None:
        for group in self.param_groups:
            group.update(progress)

    # -- the step ------------------------------------------------------------------------------------------------------
    def move(self, oracle: LossOracle) -> Estimate:
        """Take one step."""
        if self.switch == "epoch" and self.phase == "random" and self.param_groups[0]["epoch"] is None:
            raise MisconfigurationException(
                f"HybridZO changes its phases with epoch {self.switch_epoch}, but was not told of any. Call"
                " `begin_epoch(epoch)` when one begins; in a Trainer ZerothOrderGradient does."
            )
        if self.phase == "random":
            return self._move_at_random(oracle)
        drop_coordinates(oracle, self.coordinate_dropout)
        return self._move_by_coordinates(oracle)

    def _move_at_random(self, oracle: LossOracle) -> Estimate:
        self.zero_grad(set_to_none=False)
        estimate = self.random.add(oracle)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step = parameter.grad.sign() if self.sign_first else parameter.grad
                    parameter.data.add_(step, alpha=-group["lr"])
        if self.switch == "plateau" and self.monitor is None:
            return self._note_loss(oracle, estimate)
        return estimate

    def _move_by_coordinates(self, oracle: LossOracle) -> Estimate:
        if self.trials is not None:
            rates = {id(value): _rate(group) for group in self.param_groups for value in group["params"]}
            return self.trials.move(oracle, {name: rates[id(value)] for name, value in oracle.parameters.items()})
        self.zero_grad(set_to_none=False)
        estimate = self.coordinates.add(oracle)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                step = parameter.grad
                if group["momentum"]:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = step.clone()
                    else:
                        state["momentum_buffer"].mul_(group["momentum"]).add_(step)
                    step = state["momentum_buffer"]
                parameter.data.add_(step, alpha=-_rate(group))
        return estimate


def _rate(group: dict[str, Any]) -> float:
    """Learning rate of the second phase, with what a scheduler did to that of the first."""
    return float(group["coordinate_lr"] * group["lr"] / group["constant_lr"])
