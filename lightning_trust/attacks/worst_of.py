"""The worst that several attacks find for each sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_trust.attacks.attack import Attack, Loss, LossName, Problem
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import per_sample


class WorstOf(Attack):
    r"""Runs several attacks, such as PGD in several norms, and keeps for each sample what has the largest loss.

    .. math:: x' = x'_{i^*}, \qquad i^* = \arg\max_i \ell(f(x'_i), y)

    Training on it is the "max" strategy for several norms; :class:`MSD` takes the best norm in every step instead.

    Paper: Adversarial Training and Robustness for Multiple Perturbations (NeurIPS 2019).

    Args:
        attacks: The attacks, none of which is targeted; of equal losses the first one counts.
        loss: By which the worst is chosen; each attack maximises its own.
        space: Box and normalisation of the inputs, for all attacks.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If there is no attack, one is targeted or has a ``space`` or ``batch_size`` of its own, or they
            differ in ``batch_norm``.

    Example:
        >>> import torch
        >>> from lightning_trust.attacks import PGD
        >>> model = lambda x: torch.stack([x.sum(dim=1), -x.sum(dim=1)], dim=1)
        >>> attack = WorstOf([PGD(eps=0.1), PGD(eps=0.3, norm="l2", random_start=False)])
        >>> attack(model, torch.full((1, 4), 0.5), torch.tensor([0]))
        tensor([[0.3500, 0.3500, 0.3500, 0.3500]])

    """

    def __init__(
        self,
        attacks: Sequence[Attack],
        loss: LossName | Loss = "ce",
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        check_attacks(attacks)
        self.attacks = list(attacks)
        super().__init__(None, "linf", False, loss, attacks[0].batch_norm, space, batch_size)

    def check_budget(self, space: InputSpace) -> None:
        """Refuse a radius that cannot be meant in the units of a space; see the base."""
        for attack in self.attacks:
            attack.check_budget(space)

    def _perturb(self, problem: Problem) -> Tensor:
        worst, held = problem.inputs, problem.inputs.new_full((len(problem),), -torch.inf)
        for attack in self.attacks:
            found = problem.inputs if attack.eps == 0.0 else attack.perturb(problem)
            values = self.values(problem.outputs(found), problem).detach()
            better = values > held
            worst = torch.where(per_sample(better, worst), found, worst)
            held = torch.where(better, values, held)
        return worst


def check_attacks(attacks: Sequence[Attack]) -> None:
    """Refuse attacks that cannot run side by side on one batch.

    Raises:
        ValueError: If there is none, one is targeted or has a ``space`` or ``batch_size`` of its own, or they differ in
            ``batch_norm``.

    """
    if not len(attacks):
        raise ValueError("Expected argument `attacks` to hold at least one attack, but got none.")
    for attack in attacks:
        for name, least in (("targeted", False), ("space", None), ("batch_size", None)):
            if getattr(attack, name) != least:
                raise ValueError(
                    f"Expected argument `attacks` to hold attacks with {name}={least}, but got a"
                    f" {type(attack).__name__} with {name}={getattr(attack, name)!r}."
                )
    kinds = sorted({attack.batch_norm for attack in attacks})
    if len(kinds) > 1:
        raise ValueError(f"Expected argument `attacks` to hold attacks with the same `batch_norm`, but got {kinds}.")
