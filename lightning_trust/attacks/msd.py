"""Multi steepest descent: one perturbation against three norms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_trust.attacks.attack import Attack, Loss, LossName, Problem
from lightning_trust.attacks.pgd import ball_step
from lightning_trust.attacks.preparation import check_counts, check_positive, check_radius
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import Norm, per_sample


class MSD(Attack):
    r"""Multi steepest descent: in every step, the best of an l-infinity, an l2 and an l1 step.

    .. math:: x_{t+1} = \arg\max_{x' \in \{x'_\infty, x'_2, x'_1\}} \ell(f(x'), y)

    with :math:`x'_p` one PGD step of norm :math:`p` from :math:`x_t`, projected on its own ball and the box. Of all
    points, the one with the largest loss is returned. It lies in one of the balls, not in all of them.

    Paper: Adversarial Robustness Against the Union of Multiple Perturbation Models (ICML 2020).

    Args:
        eps_linf: Radius of the l-infinity ball in raw units.
        eps_l2: Radius of the l2 ball.
        eps_l1: Radius of the l1 ball.
        step_linf: Size of an l-infinity step.
        step_l2: Size of an l2 step.
        step_l1: Size of an l1 step, which goes along 5 to 20 entries.
        steps: Number of steps.
        random_start: Whether to start at a random point of the l-infinity ball; else at the clean inputs.
        targeted: Whether to reach the classes given as ``target``.
        loss: What is maximised; see :class:`~lightning_trust.attacks.Attack`.
        batch_norm: Statistics that BatchNorm uses.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([x.sum(dim=1), -x.sum(dim=1)], dim=1)
        >>> attack = MSD(eps_linf=0.05, eps_l2=0.3, eps_l1=0.3, step_l2=0.1)
        >>> attack(model, torch.full((1, 4), 0.5), torch.tensor([0]))
        tensor([[0.3500, 0.3500, 0.3500, 0.3500]])

    """

    def __init__(
        self,
        eps_linf: float = 8 / 255,
        eps_l2: float = 1.0,
        eps_l1: float = 12.0,
        step_linf: float = 2 / 255,
        step_l2: float = 0.2,
        step_l1: float = 0.05,
        steps: int = 50,
        random_start: bool = False,
        targeted: bool = False,
        loss: LossName | Loss = "ce",
        batch_norm: Literal["eval", "batch"] = "eval",
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.eps_linf, self.eps_l2, self.eps_l1 = eps_linf, eps_l2, eps_l1
        for name, eps in (("eps_linf", eps_linf), ("eps_l2", eps_l2), ("eps_l1", eps_l1)):
            if not 0.0 < eps < float("inf"):
                raise ValueError(f"Expected argument `{name}` to be positive and finite, but got {eps}.")
        check_positive(step_linf=step_linf, step_l2=step_l2, step_l1=step_l1)
        check_counts(steps=steps)
        super().__init__(None, "linf", targeted, loss, batch_norm, space, batch_size)
        self.step_linf, self.step_l2, self.step_l1 = step_linf, step_l2, step_l1
        self.steps = steps
        self.random_start = random_start

    def check_budget(self, space: InputSpace) -> None:
        """Refuse an l-infinity radius that cannot be meant in the units of a space; see the base."""
        check_radius(self.eps_linf, space)

    def _perturb(self, problem: Problem) -> Tensor:
        x = moved = problem.inputs
        if self.random_start:
            noise = (2.0 * problem.draws.uniform(*x.shape[1:]) - 1.0).to(x.dtype)
            moved = problem.clip(x + self.eps_linf * noise)
        balls: list[tuple[Norm, float, float]] = [
            ("linf", self.eps_linf, self.step_linf),
            ("l2", self.eps_l2, self.step_l2),
            ("l1", self.eps_l1, self.step_l1),
        ]
        best, held = moved, x.new_full((len(problem),), -torch.inf)
        for step in range(self.steps):
            gradient, values, _ = self.gradient(problem, moved, step)
            if step == 0:
                held = values
            points = [ball_step(problem, moved, gradient, eps, size, norm, "topk") for norm, eps, size in balls]
            # a forward pass for each norm: together they would need three times the memory
            heights = torch.stack([self.values(problem.outputs(point), problem).detach() for point in points])
            highest, which = heights.max(dim=0)
            rows = torch.arange(len(x), device=x.device)
            moved = torch.stack(points)[which, rows]
            better = highest > held
            best = torch.where(per_sample(better, best), moved, best)
            held = torch.where(better, highest, held)
        return best
