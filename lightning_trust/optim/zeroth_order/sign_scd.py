"""Stochastic coordinate descent by the signs of differences."""

from __future__ import annotations

from torch import nn
from torch.optim.optimizer import ParamsT

from lightning_trust.optim.layers import check_range
from lightning_trust.optim.zeroth_order.coordinate_trials import CoordinateTrials, Rule, drop_coordinates
from lightning_trust.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle


class SignSCD(ZerothOrderOptimizer):
    r"""Sign-based stochastic coordinate descent: each weight goes a step up or down, whichever lowers the loss.

    .. math:: \theta_i \leftarrow \begin{cases}
        \theta_i + \eta & \text{if } l(\theta + \eta e_i) < l(\theta) \\
        \theta_i - \eta & \text{else, if } l(\theta - \eta e_i) < l(\theta) \\
        \theta_i & \text{else} \end{cases}

    for the coordinates :math:`i` that are not left out in this step. Under ``rule="sign"`` they follow one another,
    each from where those before it led, so the loss of the step's batch never rises; under ``"batch"`` all are tried
    from the same weights and then moved together, many evaluated at a time as :class:`CGE` does. Without ``stp`` (three
    points, the third line) a weight that does not go up goes down.

    One query, and one or two for every coordinate. A step of one coordinate is one query after another: what it takes
    grows with the number of weights, which has to be small (:func:`lightning_trust.nn.tensorize`). The number of steps
    that a weight can go says how far it comes; let a scheduler lower the learning rate.

    Papers: Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks (arXiv 2308.09858);
    Stochastic Three Points Method for Unconstrained Smooth Minimization (SIAM J. Optim. 2020, arXiv:1902.03591).

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Length :math:`\eta` of a step, at least 0.
        rule: ``"sign"`` or ``"batch"``.
        coordinate_dropout: Probability with which a coordinate is left out of a step, in [0, 1).
        stp: Whether a weight stays where neither sign lowers the loss.
        module: The network, for ``rule="batch"`` to evaluate many coordinates at a time.
        seed: Seed of what is left out; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range, or the loss at the weights as they are is not finite.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = SignSCD([weight], lr=0.125, coordinate_dropout=0.0)
        >>> losses = [float(optimizer.step(lambda: weight.abs().sum())) for _ in range(20)]
        >>> losses[:3], losses[-1]
        ([3.0, 2.75, 2.5], 0.0)

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        rule: Rule = "sign",
        coordinate_dropout: float = 0.5,
        stp: bool = True,
        module: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        check_range("lr", lr)
        check_range("coordinate_dropout", coordinate_dropout, high=1.0)
        self.trials = CoordinateTrials(rule, stp)
        super().__init__(params, {"lr": lr}, module, seed)
        self.coordinate_dropout = coordinate_dropout

    def move(self, oracle: LossOracle) -> Estimate:
        """Take one step."""
        drop_coordinates(oracle, self.coordinate_dropout)
        rates = {id(parameter): float(group["lr"]) for group in self.param_groups for parameter in group["params"]}
        return self.trials.move(oracle, {name: rates[id(value)] for name, value in oracle.parameters.items()})
