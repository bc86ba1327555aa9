"""Pattern search: coordinates are polled with a step that is halved where none of them helps."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from lightning_trust.optim.layers import check_range
from lightning_trust.optim.zeroth_order.coordinate_trials import CoordinateTrials
from lightning_trust.optim.zeroth_order.optimizer import ZerothOrderOptimizer
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle


class PatternSearch(ZerothOrderOptimizer):
    r"""Pattern (compass) search: every weight is tried up and down, an improvement is kept, and steps are halved.

    .. math:: \theta_i \leftarrow \begin{cases}
        \theta_i + \mu & \text{if } l(\theta + \mu e_i) < l(\theta) \\
        \theta_i - \mu & \text{else, if } l(\theta - \mu e_i) < l(\theta) \\
        \theta_i & \text{else} \end{cases}, \qquad
        \mu \leftarrow \mu / 2 \text{ where no } i \text{ improved}

    A step goes over all coordinates in their order, each from where those before it led, so the loss of its batch never
    rises; it costs one query and one or two for every coordinate. On one batch the gradient at the points where
    :math:`\mu` is halved goes to zero with it. The length is ``lr``, halved as often as the ``halvings`` of the
    group, which the state dict keeps; a scheduler may lower ``lr`` as well.

    Papers: "Direct Search" Solution of Numerical and Statistical Problems (J. ACM 1961); On the Convergence of Pattern
    Search Algorithms (SIAM J. Optim. 1997).

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Length :math:`\mu` of a step before the first halving, at least 0.
        seed: Seed of what the loss draws; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If ``lr`` is out of its range, or a loss is not finite.

    Example:
        >>> weight = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = PatternSearch([weight], lr=0.75)
        >>> losses = [round(float(optimizer.step(lambda: weight.square().sum())), 4) for _ in range(6)]
        >>> losses, optimizer.lengths()
        ([5.0, 1.625, 0.3125, 0.125, 0.125, 0.0312], [0.1875])

    """

    def __init__(self, params: ParamsT, lr: float = 1e-2, seed: int | None = None) -> None:
        check_range("lr", lr)
        self.trials = CoordinateTrials("sign", stp=True)
        super().__init__(params, {"lr": lr, "halvings": 0}, None, seed)

    def lengths(self) -> list[float]:
        """The present length of a step of each group."""
        return [float(group["lr"]) * 0.5 ** int(group["halvings"]) for group in self.param_groups]

    def move(self, oracle: LossOracle) -> Estimate:
        """Poll all coordinates once."""
        groups = zip(self.param_groups, self.lengths(), strict=True)
        lengths = {id(parameter): length for group, length in groups for parameter in group["params"]}
        before = {name: value.detach().clone() for name, value in oracle.parameters.items()}
        estimate = self.trials.move(oracle, {name: lengths[id(value)] for name, value in oracle.parameters.items()})
        if all(torch.equal(value.detach(), before[name]) for name, value in oracle.parameters.items()):
            for group in self.param_groups:
                group["halvings"] += 1
        return estimate
