"""Adam on an estimate of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from lightning_trust.optim.zeroth_order.estimator import GradientEstimator
from lightning_trust.optim.zeroth_order.optimizer import EstimatingOptimizer
from lightning_trust.optim.zeroth_order.rge import RGE


class ZOAdam(EstimatingOptimizer):
    r"""Adam on an estimate of the gradient.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) \hat g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) \hat g^2,
        \quad \theta \leftarrow \theta - \eta \, \frac{\hat m}{\sqrt{\hat v} + \epsilon}

    with :math:`\hat m` and :math:`\hat v` corrected for their start at zero; the step is that of ``torch.optim.Adam``.
    In a Trainer, ``torch.optim.Adam`` on the estimate of ``ZerothOrderGradient(estimator)`` does the same.

    Paper: ZO-AdaMM: Zeroth-Order Adaptive Momentum Method for Black-Box Optimization (NeurIPS 2019, arXiv:1910.06513).

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate :math:`\eta`, at least 0.
        estimator: Estimates the gradient; ``RGE()`` if None.
        betas: Decay of the averages of the estimate and of its square, each in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: Weight decay, added to the estimate, at least 0.
        module: The network, for estimators that use more of it than its losses.
        seed: Seed of the directions; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = ZOAdam([weight], lr=0.1)
        >>> losses = [float(optimizer.step(lambda: weight.square().sum())) for _ in range(100)]
        >>> losses[0] > 1.0, losses[-1] < 0.1
        (True, True)

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        estimator: GradientEstimator | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        module: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            lambda groups: torch.optim.Adam(groups, **settings),
            params,
            settings,
            estimator or RGE(),
            module,
            seed,
        )
