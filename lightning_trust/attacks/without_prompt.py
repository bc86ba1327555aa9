"""An attack that does not know of the prompt around a network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_trust.attacks.attack import Attack, Problem
from lightning_trust.attacks.preparation import Model
from lightning_trust.core.wrapping import part_around


class WithoutPrompt(Attack):
    """Attacks the network inside a prompt; what it finds is then given to both.

    The threat model of "Visual Prompting for Adversarial Robustness" (ICASSP 2023): white box to the network, blind to
    the prompt. Accuracy under it says nothing of an attacker who knows the defence: evaluate with the bare attack as
    well.

    Args:
        attack: The attack.

    Raises:
        ValueError: If there is no prompt around the network.

    Example:
        >>> from lightning_trust.attacks import PGD
        >>> from lightning_trust.callbacks import RobustEvaluation
        >>> attack = PGD(eps=0.05, steps=5)
        >>> list(RobustEvaluation({"transfer": WithoutPrompt(attack), "adaptive": attack}).attacks)
        ['transfer', 'adaptive']

    """

    def __init__(self, attack: Attack) -> None:
        super().__init__(attack.eps, attack.norm, attack.targeted, attack.loss, attack.batch_norm, attack.space)
        self.attack = attack

    def check_budget(self, space: Any) -> None:
        """Refuse a radius that cannot be meant in the units of a space; see the base."""
        if hasattr(self, "attack"):
            self.attack.check_budget(space)

    def __call__(self, model: Model, inputs: Tensor, targets: Tensor, **settings: Any) -> Tensor:
        """Attack a batch; see the base."""
        part = part_around(model)
        if part is None:
            raise ValueError(
                "WithoutPrompt attacks the network inside a prompt, but there is none around the"
                f" {type(model).__name__}. Take the attack itself."
            )
        with part.removed():
            return self.attack(model, inputs, targets, **settings)

    def _perturb(self, problem: Problem) -> Tensor:
        return self.attack.perturb(problem)
