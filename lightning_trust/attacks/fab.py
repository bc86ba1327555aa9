"""Fast adaptive boundary attack: the nearest misclassified point."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_trust.attacks.apgd import ranked_classes
from lightning_trust.attacks.attack import Problem
from lightning_trust.attacks.deepfool import lead_slopes
from lightning_trust.attacks.preparation import check_counts, check_shares
from lightning_trust.attacks.search import Remaining, SearchAttack
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import (
    Norm,
    hyperplane_step,
    norm_of,
    per_sample,
)

_DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}
_START: dict[Norm, float] = {"linf": 0.3, "l2": 1.0, "l1": 5.0}


class FAB(SearchAttack):
    r"""Fast adaptive boundary attack: a smallest perturbation, by steps onto the linearised decision boundary.

    With :math:`d_1, d_2` the smallest steps from the current and from the clean point onto the linearised boundary of
    the nearest class, inside the box,

    .. math:: x \leftarrow \mathrm{clip}\big((1 - a)(x + \eta d_1) + a (x_0 + \eta d_2)\big), \qquad
        a = \min\Big(\frac{\lVert d_1 \rVert_p}{\lVert d_1 \rVert_p + \lVert d_2 \rVert_p}, \alpha_{\max}\Big)

    and where that is misclassified, it is noted if it is closer than before and drawn back,
    :math:`x \leftarrow x_0 + \beta (x - x_0)`.

    With a radius, only points in the ball count: a sample leaves the batch with the first, and comes back clean
    without one. With ``eps=None`` the closest point found in all steps is returned, however far.

    Paper: Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack (ICML 2020).

    Args:
        eps: Radius in raw units; None for the smallest perturbation.
        norm: Norm that is made small.
        steps: Number of steps, at least 1.
        restarts: Number of starts, at least 1; the first is the clean input, the others are random points half as far
            as ``eps`` (0.3, 1 and 5 for linf, l2 and l1 if None).
        alpha_max: Largest share :math:`\alpha_{\max}` of the step from the clean point, in (0, 1].
        eta: Overshoot :math:`\eta`, at least 1.
        beta: Share :math:`\beta` of the way that is left after a success, in (0, 1].
        n_target_classes: If given, the boundaries to so many of the likeliest wrong classes are tried one after the
            other, which costs one backward pass a step instead of one for each class; all if there are fewer.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([x.sum(dim=1), 0.8 - x.sum(dim=1)], dim=1)
        >>> FAB(eps=0.35, steps=5)(model, torch.full((1, 2), 0.5), torch.tensor([0]))
        tensor([[0.1850, 0.1850]])

    """

    def __init__(
        self,
        eps: float | None = 8 / 255,
        norm: Norm = "linf",
        steps: int = 100,
        restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        n_target_classes: int | None = None,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(eps, norm, False, "margin", "eval", space, batch_size)
        check_counts(steps=steps, restarts=restarts)
        check_shares(alpha_max=alpha_max, beta=beta)
        if not eta >= 1.0:
            raise ValueError(f"Expected argument `eta` to be at least 1, but got {eta}.")
        if n_target_classes is not None:
            check_counts(n_target_classes=n_target_classes)
        self.steps = steps
        self.restarts = restarts
        self.alpha_max = alpha_max
        self.eta = eta
        self.beta = beta
        self.n_target_classes = n_target_classes

    def search(self, problem: Problem, outputs: Tensor) -> Tensor:
        """Perturbed inputs of samples that the network gets right; see the base."""
        ranked = ranked_classes(outputs, problem.targets)
        # without targets there is one round, in which each step looks for the nearest class
        rounds = 1 if self.n_target_classes is None else min(self.n_target_classes, ranked.shape[1])
        remaining = Remaining(problem.inputs.clone())
        nearest = problem.inputs.new_full((len(problem),), torch.inf)
        for round_ in range(rounds):
            if self.n_target_classes is not None:
                problem = replace(problem, goal=ranked[:, round_])
            for start in range(self.restarts):
                found, lengths = self._run(problem, start > 0)
                remaining.put(lengths < nearest, found)
                nearest = torch.minimum(nearest, lengths)
                if self.eps is None:
                    continue
                done = nearest <= self.eps
                stay = remaining.drop(done)
                if not len(stay):
                    return remaining.found
                if len(stay) < len(problem):
                    problem, ranked, nearest = problem.rows(stay), ranked[stay], nearest[stay]
        return remaining.found

    def _run(self, problem: Problem, at_random: bool) -> tuple[Tensor, Tensor]:
        """The nearest points that count, and how far they are: infinitely, where there is none."""
        remaining = Remaining(problem.inputs.clone())
        nearest = problem.inputs.new_full((len(problem),), torch.inf)
        x = problem.inputs
        moved = self._random_start(problem) if at_random else x
        for step in range(self.steps):
            gap, slope = self._boundary(problem, moved, step)
            # both projections at once: half the calls
            steps = hyperplane_step(
                torch.cat([moved, x]),
                torch.cat([slope, slope]),
                torch.cat([gap, gap + (slope * (moved - x)).flatten(1).sum(dim=1)]),
                self.norm,
                problem.low,
                problem.high,
            )
            here, home = steps.chunk(2)
            lengths = norm_of(steps, self.norm).clamp_min(1e-8)
            first, second = lengths.chunk(2)
            share = per_sample((first / (first + second)).clamp_max(self.alpha_max), x)
            moved = problem.clip((moved + self.eta * here) * (1.0 - share) + (x + self.eta * home) * share)
            broken = problem.outputs(moved).argmax(dim=1) != problem.targets
            if not bool(broken.any()):
                continue
            away = moved - x
            length = norm_of(away, self.norm)
            counts = broken if self.eps is None else broken & (length <= self.eps)
            new = counts & (length < nearest[remaining.rows])
            remaining.put(new, moved)
            nearest[remaining.rows[new]] = length[new]
            moved = torch.where(per_sample(broken, x), x + self.beta * away, moved)
            if self.eps is not None and bool(new.any()):
                stay = remaining.drop(new)
                if not len(stay):
                    break
                problem, moved = problem.rows(stay), moved[stay]
                x = problem.inputs
        return remaining.found, nearest

    def _boundary(self, problem: Problem, moved: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What the nearest class, or the one aimed at, is short of, and the slope of that difference of logits."""
        if problem.goal is not None:
            slope, ahead, _ = self.gradient(problem, moved, step)
            return -ahead, slope
        ahead, slopes = lead_slopes(problem, moved)
        lengths = torch.stack([norm_of(slope, _DUAL[self.norm]) for slope in slopes], dim=1)
        distances = (ahead.abs() / (lengths + 1e-12)).scatter(1, problem.targets[:, None], torch.inf)
        nearest = distances.argmin(dim=1)
        rows = torch.arange(len(moved), device=moved.device)
        return -ahead[rows, nearest], slopes[nearest, rows]

    def values(self, outputs: Tensor, problem: Problem) -> Tensor:
        """How far the class aimed at is above the true one, not above all others."""
        if problem.goal is None:
            return super().values(outputs, problem)
        true = outputs.gather(1, problem.targets[:, None])
        return (outputs.gather(1, problem.goal[:, None]) - true).squeeze(1)

    def _random_start(self, problem: Problem) -> Tensor:
        x, shape = problem.inputs, problem.inputs.shape[1:]
        direction = 2.0 * problem.draws.uniform(*shape) - 1.0 if self.norm == "linf" else problem.draws.normal(*shape)
        direction = direction.to(x.dtype)
        radius = 0.5 * (_START[self.norm] * (problem.high - problem.low) if self.eps is None else self.eps)
        length = norm_of(direction, self.norm).clamp_min(1e-12)
        return problem.clip(x + direction * per_sample(radius / length, x))
