"""LARS: SGD with momentum whose step is a share of the layer's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_trust.optim.layers import LayerwiseOptimizer, check_range, norms, scaled_by


# timm.optim.Lars has the same arithmetic, and is what this one is tested against; but it decides for a whole parameter
# group whether to adapt, so that `exclude_1d` would have to split the groups that the user made, and it takes sparse
# gradients.
class LARS(LayerwiseOptimizer):
    r"""Large-batch optimizer: SGD with momentum, where the gradient of each layer is scaled to the norm of its weights.

    For each parameter tensor :math:`\theta` with gradient :math:`g`

    .. math::
        r &= \tau \, \frac{\Vert\theta\Vert_2}{\Vert g\Vert_2 + \lambda \Vert\theta\Vert_2 + \epsilon}, \qquad
        b \leftarrow \mu b + r \, (g + \lambda \theta) \\
        \theta &\leftarrow \theta - \eta \, b

    with :math:`r = 1` where either norm is 0. Biases and the scales of normalisation layers, which have one dimension,
    take plain steps of SGD with momentum and no weight decay.

    Paper: Large Batch Training of Convolutional Networks (arXiv:1708.03888).

    Gradients must be dense, and unscaled: Lightning and ``GradScaler.step`` see to it under precision 16-mixed.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate :math:`\eta`, at least 0.
        momentum: Momentum :math:`\mu` in [0, 1).
        weight_decay: Decay :math:`\lambda`, at least 0.
        trust_coefficient: Share :math:`\tau` of its norm that a layer may move by at learning rate 1, at least 0.
        exclude_1d: Whether parameters of at most one dimension are neither scaled nor decayed.
        eps: Added to the denominator :math:`\epsilon`, at least 0.

    Raises:
        ValueError: If a number is out of its range, or (in a step) a gradient is sparse.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LARS([weight], lr=1.0, weight_decay=0.0, trust_coefficient=0.1)
        >>> weight.grad = torch.tensor([[7.0, 0.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[2.5000, 4.0000]])

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust_coefficient: float = 1e-3,
        exclude_1d: bool = True,
        eps: float = 1e-8,
    ) -> None:
        check_range("lr", lr)
        check_range("momentum", momentum, high=1.0)
        check_range("weight_decay", weight_decay)
        check_range("trust_coefficient", trust_coefficient)
        check_range("eps", eps)
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "exclude_1d": exclude_1d,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def _move(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        plain = [parameter for parameter in parameters if group["exclude_1d"] and parameter.ndim <= 1]
        layers = [parameter for parameter in parameters if not (group["exclude_1d"] and parameter.ndim <= 1)]
        steps: list[Tensor] = [parameter.grad for parameter in plain if parameter.grad is not None]
        if layers:
            gradients: list[Tensor] = [parameter.grad for parameter in layers if parameter.grad is not None]
            weights, lengths = norms(layers), norms(gradients)
            ratios = group["trust_coefficient"] * weights / (lengths + group["weight_decay"] * weights + group["eps"])
            ratios = torch.where((weights > 0.0) & (lengths > 0.0), ratios, torch.ones_like(ratios))
            # a new list: `.grad` is left as it is
            decayed = list(torch._foreach_add(gradients, layers, alpha=group["weight_decay"]))
            scaled_by(decayed, ratios)
            steps += decayed
        if group["momentum"]:
            steps = [self._momentum(*pair, group["momentum"]) for pair in zip(plain + layers, steps, strict=True)]
        torch._foreach_add_(plain + layers, steps, alpha=-group["lr"])

    def _momentum(self, parameter: Tensor, step: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = step.clone()
            return state["momentum_buffer"]
        return state["momentum_buffer"].mul_(momentum).add_(step)
