"""An attack on a network of experts that moves its decision as well."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_trust.attacks.pgd import PGD
from lightning_trust.attacks.preparation import Model, attack_mode, check_logits
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.losses import check_classes
from lightning_trust.functional.adversarial.projections import Norm
from lightning_trust.nn.adversarial.moe import JointOutputs, MoENetwork


class RoutedPGD(PGD):
    r"""PGD on the prediction of a network of experts and on the decision of its router at once.

    .. math:: \max_{\lVert \delta \rVert \le \epsilon} \; \mathrm{CE}(f(x + \delta), y)
        + w \, \mathrm{CE}(s(x + \delta), \arg\max s(x))

    In eval mode the decision of a :class:`~lightning_trust.nn.MoENetwork` has no gradient, so other attacks on
    gradients leave it where it is. This one drives the scores :math:`s` away from the clean decision, and may send an
    image to an expert that never saw its class. Neither is always the stronger: evaluate with both; their union counts.

    Paper: Robust Mixture-of-Expert Training for Convolutional Neural Networks (ICCV 2023).

    Args:
        eps: Radius of the ball in raw units.
        step_size: Size of a step in raw units; as in :class:`PGD` if None.
        steps: Number of steps.
        random_start: As in :class:`PGD`.
        norm: Norm of the ball.
        router_weight: Weight :math:`w` of the decision, positive.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range, or the network is none of experts.

    Example:
        >>> from lightning_trust.attacks import PGD
        >>> from lightning_trust.callbacks import RobustEvaluation
        >>> evaluation = RobustEvaluation({"pgd": PGD(eps=0.1, steps=20), "routed": RoutedPGD(eps=0.1, steps=20)})
        >>> list(evaluation.attacks)
        ['pgd', 'routed']

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        random_start: bool | Literal["gaussian"] = True,
        norm: Norm = "linf",
        router_weight: float = 1.0,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(
            eps, step_size, steps, random_start=random_start, norm=norm, space=space, batch_size=batch_size
        )
        if not router_weight > 0.0:
            raise ValueError(f"Expected argument `router_weight` to be positive, but got {router_weight}.")
        self.router_weight = router_weight

    def __call__(self, model: Model, inputs: Tensor, targets: Tensor, **settings: Any) -> Tensor:
        """Attack a batch; see the base."""
        network = getattr(model, "_orig_mod", model)
        if not isinstance(network, MoENetwork):
            raise ValueError(
                f"RoutedPGD moves the decision of a MoENetwork, but got a {type(network).__name__}. For other networks"
                " take PGD."
            )
        with attack_mode(network), torch.no_grad():
            logits, scores = network.forward_with_scores(inputs)
        if settings.get("check", True):
            check_classes(logits, 2, "ce")
            check_logits(logits, targets, type(self).__name__)
        goals = torch.stack([targets, scores.argmax(dim=1)], dim=1)
        loss = partial(_joint_cross_entropy, network.num_experts, self.router_weight)
        return PGD.__call__(self.replaced(loss=loss), JointOutputs(network), inputs, goals, **settings)


def _joint_cross_entropy(experts: int, weight: float, outputs: Tensor, goals: Tensor) -> Tensor:
    """Cross-entropy of the classes plus that of the decisions, one value a sample."""
    prediction = torch.nn.functional.cross_entropy(outputs[:, :-experts], goals[:, 0], reduction="none")
    return prediction + weight * torch.nn.functional.cross_entropy(outputs[:, -experts:], goals[:, 1], reduction="none")
