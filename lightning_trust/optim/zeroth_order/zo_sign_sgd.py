"""Steps along signs of an estimate of the gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.optimizer import ParamsT

from lightning_trust.optim.zeroth_order.estimator import GradientEstimator
from lightning_trust.optim.zeroth_order.optimizer import EstimatingOptimizer
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle
from lightning_trust.optim.zeroth_order.rge import RGE


class ZOSignSGD(EstimatingOptimizer):
    r"""SGD along the signs of an estimate: of each entry, or of the derivative along each direction.

    .. math:: \theta \leftarrow \theta - \eta \, \mathrm{sign}(\hat g) \quad\text{(elementwise)}, \qquad
        \theta \leftarrow \theta - \frac{\eta}{q} \sum_{j=1}^q \mathrm{sign}(c_j) \, u_j \quad\text{(scalar)}

    with :math:`c_j` the estimated derivative along :math:`u_j`.

    Papers: signSGD via Zeroth-Order Oracle (ICLR 2019; elementwise); Revisiting Zeroth-Order Optimization for
    Memory-Efficient LLM Fine-Tuning: A Benchmark (ICML 2024, arXiv:2402.11592; scalar).

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate :math:`\eta`, at least 0: what every weight moves (elementwise).
        estimator: Estimates the gradient; ``RGE()`` if None. The rule ``"scalar"`` needs an RGE.
        rule: ``"scalar"`` or ``"elementwise"``.
        weight_decay: Weight decay, added to what the step is along, at least 0.
        module: The network, for estimators that use more of it than its losses.
        seed: Seed of the directions; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: If the rule is ``"scalar"`` and the estimator no RGE.

    Example:
        >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = ZOSignSGD([weight], lr=0.05, rule="elementwise", estimator=RGE(q=4))
        >>> losses = [float(optimizer.step(lambda: weight.square().sum())) for _ in range(100)]
        >>> losses[0] > 1.0, losses[-1] < 0.1
        (True, True)

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        estimator: GradientEstimator | None = None,
        rule: Literal["scalar", "elementwise"] = "scalar",
        weight_decay: float = 0.0,
        module: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        if rule not in ("scalar", "elementwise"):
            raise ValueError(f"Expected argument `rule` to be 'scalar' or 'elementwise', but got {rule!r}.")
        estimator = estimator or RGE()
        if rule == "scalar" and not isinstance(estimator, RGE):
            raise MisconfigurationException(
                "ZOSignSGD(rule='scalar') takes the signs of derivatives along random directions, so its estimator must"
                f" be an RGE, but got {estimator!r}. Take rule='elementwise'."
            )
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(lambda groups: torch.optim.SGD(groups, **settings), params, settings, estimator, module, seed)
        self.rule = rule

    def write_gradient(self, oracle: LossOracle) -> Estimate:
        """Add to ``.grad`` what the step is taken along."""
        if self.rule == "scalar" and isinstance(self.estimator, RGE):
            slopes = self.estimator.slopes(oracle)
            for seed, factor in zip(slopes.seeds, slopes.factors(slopes.values.sign()), strict=True):
                slopes.directions.add_to_gradients(seed, factor)
            return slopes.estimate
        estimate = self.estimator.add(oracle)
        for parameter in oracle.parameters.values():
            if parameter.grad is not None:
                parameter.grad.sign_()
        return estimate
