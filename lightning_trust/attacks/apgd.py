"""Auto-PGD: gradient ascent with momentum that sets its own step sizes, and its targeted variant."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_trust.attacks.attack import LossName, Problem
from lightning_trust.attacks.preparation import check_counts, check_shares
from lightning_trust.attacks.search import Remaining, SearchAttack
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import (
    Norm,
    norm_of,
    per_sample,
    project_l1_box,
    project_l2,
)

# Mind the Box: share of the gradient that an l1 step keeps at first, what the sparsity of the best point is divided by,
# what a step is divided by, and how often
_SHARE, _DENSER, _SHORTER, _LEAST_STEP = 0.2, 1.5, 1.5, 10.0


@dataclass
class _State:
    """Where the remaining samples stand; each field has one row a sample."""

    moved: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    size: Tensor
    rises: Tensor
    halved: Tensor
    checked_value: Tensor
    share: Tensor
    sparsity: Tensor

    def rows(self, rows: Tensor) -> _State:
        return _State(*(getattr(self, field.name)[rows] for field in fields(self)))


class APGD(SearchAttack):
    r"""Auto-PGD: ascent whose step sizes follow from the progress that each sample makes.

    .. math:: z_{t+1} = P(x_t + \eta_t \, d(g_t)), \qquad
        x_{t+1} = P(x_t + 0.75 (z_{t+1} - x_t) + 0.25 (x_t - x_{t-1}))

    from a random point of the surface, with :math:`\eta_0 = 2\epsilon`. At checkpoints that follow each other closer
    and closer, a sample whose loss rose in at most a share ``rho`` of the last steps, or whose best loss has not risen
    since a checkpoint that left its step as it was, goes on from its best point with half the step. For l1 the step is
    the sign of the largest entries of the gradient, as many as the sparsity of the best point asks for, with an exact
    projection onto ball and box and no momentum.

    A sample leaves the batch as soon as it is misclassified. Of those that are not, the point with the largest loss is
    returned.

    Paper: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks (ICML 2020);
    l1: Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers (ICML 2021).

    Args:
        eps: Radius in raw units.
        norm: Norm of the ball.
        loss: What is maximised: ``"ce"``, ``"dlr"``, ``"margin"``, ``"kl"`` or a function of outputs and targets.
        steps: Number of steps, at least 1.
        restarts: Number of random starts, at least 1.
        rho: Share of rising steps below which a step is halved, in (0, 1].
        eot_iter: Forward and backward passes a step, averaged, for networks that answer at random.
        larger_eps: Only l1: the first and second 30 % of the steps are taken in balls of three and two times the
            radius, each going on from the best point of the last.
        early_stop: Whether a sample is let go once it is misclassified; if not, the point with the largest loss is
            returned for all.
        targeted: Whether to reach the classes given as ``target``.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range, or the network has too few classes for the loss.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([x.sum(dim=1), -x.sum(dim=1)], dim=1)
        >>> APGD(eps=0.1, steps=10)(model, torch.full((1, 2), 0.5), torch.tensor([0]))
        tensor([[0.4000, 0.4000]])

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        norm: Norm = "linf",
        loss: LossName = "ce",
        steps: int = 100,
        restarts: int = 1,
        rho: float = 0.75,
        eot_iter: int = 1,
        larger_eps: bool = False,
        early_stop: bool = True,
        targeted: bool = False,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(eps, norm, targeted, loss, "eval", space, batch_size)
        check_counts(steps=steps, restarts=restarts, eot_iter=eot_iter)
        check_shares(rho=rho)
        if larger_eps and norm != "l1":
            raise ValueError(f"Expected argument `larger_eps` only with norm='l1', but got norm={norm!r}.")
        self.eps: float = eps
        self.steps = steps
        self.restarts = restarts
        self.rho = rho
        self.eot_iter = eot_iter
        self.larger_eps = larger_eps
        self.early_stop = early_stop

    def _perturb(self, problem: Problem) -> Tensor:
        if self.early_stop and self.loss != "kl" and not callable(self.loss):
            return super()._perturb(problem)
        return self._restarted(problem, False)

    def search(self, problem: Problem, outputs: Tensor) -> Tensor:
        """Perturbed inputs of samples that the network gets right; see the base."""
        return self._restarted(problem, self.early_stop)

    def _restarted(self, problem: Problem, stop: bool) -> Tensor:
        remaining = Remaining(problem.inputs.clone())
        held = problem.inputs.new_full((len(problem),), -torch.inf)
        for _ in range(self.restarts):
            found, values, broken = self._run(problem, stop)
            better = broken | (values > held)
            remaining.put(better, found)
            held = torch.where(better, values, held)
            stay = remaining.drop(broken)
            if not len(stay):
                break
            problem, held = problem.rows(stay), held[stay]
        return remaining.found

    def _run(self, problem: Problem, stop: bool) -> tuple[Tensor, Tensor, Tensor]:
        """From one start: points, their values, and which are misclassified."""
        radii, parts = [self.eps], [self.steps]
        if self.larger_eps:
            early = math.ceil(0.3 * self.steps)
            radii = [3.0 * self.eps, 2.0 * self.eps, self.eps]
            parts = [early, min(early, self.steps - early), max(0, self.steps - 2 * early)]
        moved = self._start(problem, radii[0])
        for stage, (eps, steps) in enumerate(zip(radii, parts, strict=True)):
            if stage:
                moved = self._project(problem, moved, eps)
            last = stage == len(radii) - 1
            # where a wider ball was left, the sparsity is that of its best point
            moved, values, broken = self._ascend(problem, moved, eps, steps, stop and last, len(radii) > 1)
        return moved, values, broken

    def _start(self, problem: Problem, eps: float) -> Tensor:
        x, shape = problem.inputs, problem.inputs.shape[1:]
        draws = problem.draws
        direction = 2.0 * draws.uniform(*shape) - 1.0 if self.norm == "linf" else draws.normal(*shape)
        direction = direction.to(x.dtype)
        if self.norm == "l1":
            return self._project(problem, x + direction * (problem.high - problem.low), eps)
        length = norm_of(direction, self.norm).clamp_min(1e-12)
        return problem.clip(x + direction * per_sample(eps / length, x))

    def _project(self, problem: Problem, moved: Tensor, eps: float) -> Tensor:
        x = problem.inputs
        if self.norm == "l1":
            return x + project_l1_box(x, moved - x, eps, problem.low, problem.high)
        if self.norm == "l2":
            return problem.clip(x + project_l2(moved - x, eps))
        return torch.clamp(moved, problem.clip(x - eps), problem.clip(x + eps))

    def _fooled(self, problem: Problem, outputs: Tensor) -> Tensor:
        return problem.fooled(outputs)

    def _slopes(self, problem: Problem, moved: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient, values and outputs, each averaged over the passes."""
        gradient, values, outputs = self.gradient(problem, moved, step)
        for _ in range(self.eot_iter - 1):
            more = self.gradient(problem, moved, step)
            gradient, values, outputs = gradient + more[0], values + more[1], outputs + more[2]
        if self.eot_iter == 1:
            return gradient, values, outputs
        return gradient / self.eot_iter, values / self.eot_iter, outputs / self.eot_iter

    def _ascend(
        self, problem: Problem, start: Tensor, eps: float, steps: int, stop: bool, warm: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = problem.inputs
        count = len(problem)
        remaining = Remaining(start.clone())
        best_values = x.new_full((count,), -torch.inf)
        broken = torch.zeros(count, dtype=torch.bool, device=x.device)

        gradient, values, outputs = self._slopes(problem, start, 0)
        features = x[0].numel()
        size = (2.0 if self.norm != "l1" else 1.0) * eps
        sparsity = _entries(start - x) if warm else x.new_full((count,), float(features))
        state = _State(
            moved=start,
            previous=start,
            gradient=gradient,
            value=values,
            best=start,
            best_gradient=gradient,
            best_value=values,
            size=x.new_full((count,), size),
            rises=x.new_zeros(count),
            halved=torch.ones(count, dtype=torch.bool, device=x.device),
            checked_value=values,
            share=sparsity / features / _DENSER if warm else x.new_full((count,), _SHARE),
            sparsity=sparsity,
        )
        period = max(int((0.04 if self.norm == "l1" else 0.22) * steps), 1)
        since = 0
        for step in range(steps + 1):
            if stop:
                done = self._fooled(problem, outputs)
                if bool(done.any()):
                    remaining.put(done, state.moved)
                    broken[remaining.rows[done]] = True
                    best_values[remaining.rows[done]] = state.value[done]
                    stay = remaining.drop(done)
                    if not len(stay):
                        return remaining.found, best_values, broken
                    state, problem = state.rows(stay), problem.rows(stay)
            if step == steps:
                break
            if since == period:
                since = 0
                self._check(state, problem, period, size)
                if self.norm != "l1":
                    period = max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
            moved = self._step(state, problem, eps, step)
            gradient, values, outputs = self._slopes(problem, moved, step + 1)
            state.previous, state.moved, state.gradient = state.moved, moved, gradient
            state.rises += values > state.value
            state.value = values
            better = values > state.best_value
            wide = per_sample(better, moved)
            state.best = torch.where(wide, moved, state.best)
            state.best_gradient = torch.where(wide, gradient, state.best_gradient)
            state.best_value = torch.where(better, values, state.best_value)
            since += 1
        best_values[remaining.rows] = state.best_value
        remaining.found[remaining.rows] = state.best
        return remaining.found, best_values, broken

    def _step(self, state: _State, problem: Problem, eps: float, step: int) -> Tensor:
        x, moved, gradient = problem.inputs, state.moved, state.gradient
        if self.norm == "l1":
            direction = _largest(gradient, state.share).sign()
            length = norm_of(direction, "l1") + 1e-10
            return self._project(problem, moved + direction * per_sample(state.size / length, x), eps)
        size = per_sample(state.size, x)
        if self.norm == "l2":
            direction = gradient / per_sample(norm_of(gradient, "l2") + 1e-12, x)
            ahead = self._project(problem, moved + size * direction, eps)
            if step == 0:
                return ahead
            return self._project(problem, moved + 0.75 * (ahead - moved) + 0.25 * (moved - state.previous), eps)
        lowest, highest = problem.clip(x - eps), problem.clip(x + eps)
        ahead = torch.addcmul(moved, size, gradient.sign()).clamp_(lowest, highest)
        if step == 0:
            return ahead
        return ahead.sub_(moved).mul_(0.75).add_(moved).add_(moved - state.previous, alpha=0.25).clamp_(lowest, highest)

    def _check(self, state: _State, problem: Problem, period: int, size: float) -> None:
        """A checkpoint: shorter steps, from the best point, where there was too little progress."""
        if self.norm == "l1":
            entries = _entries(state.best - problem.inputs)
            back = entries < 0.95 * state.sparsity
            state.share = entries / problem.inputs[0].numel() / _DENSER
            state.size = torch.where(back, size, state.size / _SHORTER).clamp(size / _LEAST_STEP, size)
            state.sparsity = entries
        else:
            stuck = ~state.halved & (state.checked_value >= state.best_value)
            back = (state.rises <= self.rho * period) | stuck
            state.halved, state.checked_value = back, state.best_value
            state.size = torch.where(back, state.size / 2.0, state.size)
            state.rises = torch.zeros_like(state.rises)
        wide = per_sample(back, state.moved)
        # the point before stays that of the path that is left, as in the authors' code
        state.moved = torch.where(wide, state.best, state.moved)
        state.gradient = torch.where(wide, state.best_gradient, state.gradient)


class APGDTargeted(APGD):
    r"""Auto-PGD towards one class after the other: the most likely wrong one first.

    For each of the ``n_target_classes`` wrong classes that rank highest on the clean input, APGD on the targeted
    difference of logits ratio; a sample is broken when any wrong class wins. The ranks come from the one forward pass
    on the clean inputs.

    Paper: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks (ICML 2020).

    Args:
        eps: Radius in raw units.
        norm: Norm of the ball.
        n_target_classes: How many wrong classes are tried; all of them where there are fewer.
        loss: ``"dlr"``, which needs four classes, ``"ce"`` or ``"margin"``.
        steps: Number of steps for a class.
        restarts: Number of random starts for a class.
        rho: Share of rising steps below which a step is halved, in (0, 1].
        eot_iter: Forward and backward passes a step, averaged.
        larger_eps: Only l1: begin in wider balls.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range, or the network has too few classes for the loss.

    Example:
        >>> APGDTargeted(eps=0.1, norm="l2").n_target_classes
        9

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        norm: Norm = "linf",
        n_target_classes: int = 9,
        loss: Literal["dlr", "ce", "margin"] = "dlr",
        steps: int = 100,
        restarts: int = 1,
        rho: float = 0.75,
        eot_iter: int = 1,
        larger_eps: bool = False,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        if loss not in ("dlr", "ce", "margin"):
            raise ValueError(f"Expected argument `loss` to be 'dlr', 'ce' or 'margin', but got {loss!r}.")
        super().__init__(
            eps, norm, loss, steps, restarts, rho, eot_iter, larger_eps, space=space, batch_size=batch_size
        )
        check_counts(n_target_classes=n_target_classes)
        self.n_target_classes = n_target_classes

    def search(self, problem: Problem, outputs: Tensor) -> Tensor:
        """Perturbed inputs of samples that the network gets right; see the base."""
        ranked = ranked_classes(outputs, problem.targets)
        remaining = Remaining(problem.inputs.clone())
        for rank in range(min(self.n_target_classes, ranked.shape[1])):
            problem = replace(problem, goal=ranked[:, rank])
            for _ in range(self.restarts):
                found, _, broken = self._run(problem, True)
                remaining.put(broken, found)
                stay = remaining.drop(broken)
                if not len(stay):
                    return remaining.found
                if len(stay) < len(problem):
                    problem, ranked = problem.rows(stay), ranked[stay]
        return remaining.found

    def _fooled(self, problem: Problem, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=1) != problem.targets


def ranked_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """The wrong classes of each sample, the one with the largest logit first: ``(N, K)`` -> ``(N, K - 1)``."""
    # the true class goes to the end, also where another ties with it
    others = outputs.scatter(1, targets[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True)[:, :-1]


def _entries(delta: Tensor) -> Tensor:
    """Number of entries that are not zero, a sample."""
    return (delta != 0).flatten(1).sum(dim=1).to(delta.dtype)


def _largest(gradient: Tensor, share: Tensor) -> Tensor:
    """The gradient without all but a share of its entries, the largest; one share a sample."""
    magnitudes = gradient.abs().flatten(1)
    features = magnitudes.shape[1]
    place = ((1.0 - share) * features).long().clamp(0, features - 1)
    least = magnitudes.sort(dim=1).values.gather(1, place[:, None])
    return gradient * (magnitudes >= least).view_as(gradient)
