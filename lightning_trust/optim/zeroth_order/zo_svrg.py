"""Variance-reduced SGD on estimates of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lightning_trust.core.randomness import derived_seed
from lightning_trust.optim.zeroth_order.estimator import GradientEstimator, gradient_of
from lightning_trust.optim.zeroth_order.optimizer import EstimatingOptimizer, LossesOfBatches
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle, check_count
from lightning_trust.optim.zeroth_order.rge import RGE

#: The losses of the batches that an anchor's gradient is estimated on.
AnchorLosses = Callable[[], Iterable[Callable[[], Any]]]


class ZOSVRG(EstimatingOptimizer):
    r"""Stochastic variance-reduced gradients from estimates.

    .. math:: \theta \leftarrow \theta - \eta \, \big(\hat g_B(\theta; U) - \hat g_B(\tilde\theta; U)
        + \hat g(\tilde\theta)\big)

    with the same directions :math:`U` in the first two, which are on the batch :math:`B` of the step, and the last one,
    on many batches, estimated once whenever the anchor :math:`\tilde\theta` is moved to the weights as they are: every
    ``epoch_len`` steps. Twice the queries of SGD, and those of the anchor.

    Paper: Zeroth-Order Stochastic Variance Reduction for Nonconvex Optimization (NeurIPS 2018, arXiv:1805.10367).

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate :math:`\eta`, at least 0.
        estimator: Estimates the gradients; ``RGE()`` if None.
        epoch_len: Number of steps between two anchors.
        anchor_batches: Number of batches of the training data that the callback ``ZerothOrderGradient`` estimates an
            anchor's gradient on; all if None. In a loop of your own, :meth:`anchored_on` tells what to take.
        weight_decay: Weight decay, added to the step, at least 0.
        module: The network, for estimators that use more of it than its losses.
        seed: Seed of the directions; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: In the first step, if nothing told what anchors are estimated on.

    Example:
        >>> from lightning_trust.optim import CGE
        >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> centres = torch.tensor([[0.0, 0.2], [0.0, -0.2]])
        >>> losses = [lambda k=k: (weight - centres[k]).square().sum() for k in range(2)]
        >>> optimizer = ZOSVRG([weight], lr=0.05, estimator=CGE(), epoch_len=10)
        >>> optimizer.anchored_on(lambda: losses)
        >>> for step in range(100):
        ...     _ = optimizer.step(losses[step % 2])
        >>> weight.detach().norm() < 0.01
        tensor(True)

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        estimator: GradientEstimator | None = None,
        epoch_len: int = 50,
        anchor_batches: int | None = None,
        weight_decay: float = 0.0,
        module: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        check_count("epoch_len", epoch_len)
        if anchor_batches is not None:
            check_count("anchor_batches", anchor_batches)
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(
            lambda groups: torch.optim.SGD(groups, **settings), params, settings, estimator or RGE(), module, seed
        )
        self.epoch_len = epoch_len
        self.anchor_batches = anchor_batches
        self._anchor_losses: AnchorLosses | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_anchor_losses": None}

    def draws_batches(self, losses: LossesOfBatches | None) -> None:
        """Take anchors' gradients on the first ``anchor_batches`` batches of the training data."""
        self.anchored_on(None if losses is None else partial(losses, self.anchor_batches))

    def anchored_on(self, losses: AnchorLosses | None) -> None:
        """Tell what an anchor's gradient is estimated on: a function that returns one loss a batch."""
        self._anchor_losses = losses

    def write_gradient(self, oracle: LossOracle) -> Estimate:
        """Add to ``.grad`` the estimate on the batch, less that at the anchor, plus that of the anchor on all."""
        if self.steps_taken % self.epoch_len == 0 or not all("anchor" in self.state[p] for p in self._trained(oracle)):
            self._move_anchor(oracle)
        self.estimator.add(oracle)
        here = [parameter.detach().clone() for parameter in self._trained(oracle)]
        try:
            for parameter in self._trained(oracle):
                parameter.data.copy_(self.state[parameter]["anchor"])
            estimate = self.estimator.add(oracle, scale=-1.0)
        finally:
            for parameter, value in zip(self._trained(oracle), here, strict=True):
                parameter.data.copy_(value)
        for parameter in self._trained(oracle):
            gradient_of(parameter).add_(self.state[parameter]["full"])
        return estimate

    def _trained(self, oracle: LossOracle) -> list[Tensor]:
        return list(oracle.parameters.values())

    def _move_anchor(self, oracle: LossOracle) -> None:
        if self._anchor_losses is None:
            raise MisconfigurationException(
                "ZOSVRG estimates the gradient of an anchor on many batches, but was not told on which. Call"
                " `anchored_on(lambda: losses)` with one loss a batch; in a Trainer ZerothOrderGradient does."
            )
        count = 0
        for place, loss in enumerate(self._anchor_losses()):
            part = oracle.of_another_batch(loss, derived_seed(oracle.seed, "anchor", place))
            self.estimator.add(part)
            oracle.queries += part.queries
            oracle.bytes_sent += part.bytes_sent
            count += 1
        if not count:
            raise MisconfigurationException("Expected at least one batch to estimate the gradient of an anchor on.")
        for parameter in self._trained(oracle):
            self.state[parameter]["anchor"] = parameter.detach().clone()
            self.state[parameter]["full"] = gradient_of(parameter) / count
            gradient_of(parameter).zero_()
