"""LAMB: Adam whose step has the length of the layer's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_trust.optim.layers import LayerwiseOptimizer, check_range, norms, scaled_by


# timm.optim.Lamb is no match: its `trust_clip` bounds the ratio by 1 and nothing bounds the norm of the weights, so
# that layers of a norm above 10 move further; it adapts whatever has weight decay, so that there is no `adam=True`;
# and without `max_grad_norm` it takes sparse gradients. Where neither matters they agree (tests/optim/test_lamb.py).
class LAMB(LayerwiseOptimizer):
    r"""Large-batch optimizer: the step of Adam, scaled for each layer to the norm of its weights.

    For each parameter tensor :math:`\theta` with gradient :math:`g`

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= \frac{m}{\sqrt{v} + \epsilon} + \lambda \theta, \qquad
        r = \frac{\mathrm{clamp}(\Vert\theta\Vert_2, a, b)}{\Vert u \Vert_2} \\
        \theta &\leftarrow \theta - \eta \, r \, u

    with :math:`r = 1` where either norm is 0. So a layer moves by
    :math:`\eta\,\mathrm{clamp}(\Vert\theta\Vert_2, a, b)` whatever the size of its gradient.

    Paper: Large Batch Optimization for Deep Learning: Training BERT in 76 minutes (arXiv:1904.00962). The defaults are
    those of Distributed Adversarial Training to Robustify Deep Neural Networks at Scale (UAI 2022), whose code does
    not correct the bias of the averages and bounds the norm of the weights by 10.

    Gradients must be dense, and unscaled: Lightning and ``GradScaler.step`` see to it under precision 16-mixed.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate :math:`\eta`, at least 0.
        betas: Decay of the averages of the gradient and of its square, each in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: Decay :math:`\lambda`, at least 0; it is a part of the step that is scaled.
        trust_clip: Range :math:`(a, b)` that the norm of the weights is clamped to.
        adam: Whether to leave the scaling out: Adam with decoupled weight decay.
        bias_correction: Whether to divide the averages by :math:`1 - \beta^t`.

    Raises:
        ValueError: If a number is out of its range, or (in a step) a gradient is sparse.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMB([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.tensor([1e-3, 0.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([2.5000, 4.0000])

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-4,
        trust_clip: tuple[float, float] = (0.0, 10.0),
        adam: bool = False,
        bias_correction: bool = False,
    ) -> None:
        check_range("lr", lr)
        check_range("betas[0]", betas[0], high=1.0)
        check_range("betas[1]", betas[1], high=1.0)
        check_range("eps", eps)
        check_range("weight_decay", weight_decay)
        if not 0.0 <= trust_clip[0] < trust_clip[1]:
            raise ValueError(
                f"Expected argument `trust_clip` to be a range (low, high) with 0 <= low < high, but got {trust_clip}."
            )
        defaults: dict[str, Any] = {
            "lr": lr,
            # a checkpoint keeps groups as they are, and YAML gives lists
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_clip": tuple(trust_clip),
            "adam": adam,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)

    def _move(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
        gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        beta1, beta2 = group["betas"]
        # not lerp, which is inexact where a weight is 0
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1.0 - beta2)
        denominators = list(torch._foreach_sqrt(squares))
        updates = means
        if group["bias_correction"]:
            steps = [self.state[parameter]["step"].item() for parameter in parameters]
            torch._foreach_div_(denominators, [(1.0 - beta2**step) ** 0.5 for step in steps])
            updates = list(torch._foreach_div(means, [1.0 - beta1**step for step in steps]))
        torch._foreach_add_(denominators, group["eps"])
        updates = list(torch._foreach_div(updates, denominators))
        if group["eps"] == 0.0:
            # an entry that never had a gradient stays where it is
            for update, denominator in zip(updates, denominators, strict=True):
                update.masked_fill_(denominator == 0.0, 0.0)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if not group["adam"]:
            weights, lengths = norms(parameters).clamp(*group["trust_clip"]), norms(updates)
            ratios = torch.where((weights > 0.0) & (lengths > 0.0), weights / lengths, torch.ones_like(lengths))
            scaled_by(updates, ratios)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])
