"""A step that is taken only where it lowers the loss."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from lightning_trust.optim.layers import check_range
from lightning_trust.optim.zeroth_order.estimator import GradientEstimator
from lightning_trust.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle
from lightning_trust.optim.zeroth_order.rge import RGE


class ZOConservative(ZerothOrderOptimizer):
    r"""Of the weights as they are, a step against the estimate and a step along it, the ones with the lowest loss.

    .. math:: \theta \leftarrow \arg\min_{\theta'} l(\theta'), \qquad
        \theta' \in \{\theta,\ \theta - \eta \hat g,\ \theta + \eta \hat g\}

    on the batch of the step, so its loss never rises. Three queries more than the estimate.

    Paper: Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark (ICML 2024,
    arXiv:2402.11592), after Non-intrusive Conservative ZO-SGD therein.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate :math:`\eta`, at least 0.
        estimator: Estimates the gradient; ``RGE(exact_restore=True)`` if None.
        module: The network, for estimators that use more of it than its losses.
        seed: Seed of the directions; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = ZOConservative([weight], lr=0.2)
        >>> losses = [float(optimizer.step(lambda: weight.square().sum())) for _ in range(40)]
        >>> all(later <= earlier for earlier, later in zip(losses, losses[1:])), losses[-1] < 0.1
        (True, True)

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        estimator: GradientEstimator | None = None,
        module: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        check_range("lr", lr)
        super().__init__(params, {"lr": lr}, module, seed)
        # without rounding on the way back, which would raise the loss a little
        self.estimator = estimator or RGE(exact_restore=True)

    def move(self, oracle: LossOracle) -> Estimate:
        """Take one step."""
        self.zero_grad(set_to_none=False)
        estimate = self.estimator.add(oracle)
        rates = {id(parameter): float(group["lr"]) for group in self.param_groups for parameter in group["params"]}
        moved = [each for each in oracle.parameters.values() if each.grad is not None]
        kept = [parameter.detach().clone() for parameter in moved]

        def go(sign: float) -> None:
            for parameter, value in zip(moved, kept, strict=True):
                step = parameter.grad
                assert step is not None  # noqa: S101  (chosen above)
                parameter.data.copy_(torch.add(value, step, alpha=sign * rates[id(parameter)]))

        signs = (0.0, -1.0, 1.0)
        losses = []
        try:
            for sign in signs:
                go(sign)
                losses.append(oracle.combined(oracle().reshape(1)) if not oracle.splits else oracle().reshape(1))
        finally:
            go(0.0)
        found = torch.cat(losses)
        # a loss that is not finite is never the lowest; of equal ones the weights stay where they are
        best = int(torch.where(found.isfinite(), found, torch.inf).argmin())
        go(signs[best])
        return oracle.estimate(found[best], estimate.snr)
