"""SGD on an estimate of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from lightning_trust.optim.layers import check_range
from lightning_trust.optim.zeroth_order.estimator import GradientEstimator
from lightning_trust.optim.zeroth_order.optimizer import EstimatingOptimizer
from lightning_trust.optim.zeroth_order.rge import RGE


class ZOSGD(EstimatingOptimizer):
    r"""SGD, momentum and weight decay included, on an estimate of the gradient.

    .. math:: v \leftarrow m v + \hat g + \lambda \theta, \qquad \theta \leftarrow \theta - \eta v

    The step is that of ``torch.optim.SGD``. In a Trainer, any optimizer of torch on the estimate of the callback
    ``ZerothOrderGradient(estimator)`` does the same and leaves everything else to Lightning; this class is for a loop
    of your own.

    Paper: Stochastic First- and Zeroth-Order Methods for Nonconvex Stochastic Programming (SIAM J. Optim. 2013).

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate :math:`\eta`, at least 0.
        estimator: Estimates the gradient; ``RGE()`` if None.
        momentum: Momentum :math:`m`, in [0, 1).
        weight_decay: Weight decay :math:`\lambda`, at least 0.
        nesterov: Whether the momentum is Nesterov's.
        module: The network, for estimators that use more of it than its losses.
        seed: Seed of the directions; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = ZOSGD([weight], lr=0.1, estimator=RGE(q=2, distribution="rademacher"))
        >>> losses = [float(optimizer.step(lambda: weight.square().sum())) for _ in range(60)]
        >>> losses[0] > 1.0, losses[-1] < 1e-2
        (True, True)

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        estimator: GradientEstimator | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        module: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        check_range("momentum", momentum, high=1.0)
        settings: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(
            lambda groups: torch.optim.SGD(groups, **settings),
            params,
            settings,
            estimator or RGE(),
            module,
            seed,
        )
