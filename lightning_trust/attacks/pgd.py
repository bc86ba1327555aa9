"""Projected gradient ascent, and its variant with momentum."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_trust.attacks.attack import Attack, Loss, LossName, Problem
from lightning_trust.attacks.preparation import check_counts, check_positive
from lightning_trust.attacks.search import Remaining
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import (
    Norm,
    norm_of,
    per_sample,
    project,
    project_l1_box,
)

# Maini et al. and MCGR keep l1 moves this far from the box's faces
_GAP = 0.05


class PGD(Attack):
    r"""Projected gradient ascent in a norm ball and the box of valid inputs.

    .. math:: x_{t+1} = \mathrm{clip}\big(x + P_\epsilon(x_t + \alpha \, d(\nabla_x \ell(f(x_t), y)) - x)\big)

    with the direction :math:`d(g)`: linf :math:`\mathrm{sign}(g)`; l2 :math:`g / \lVert g \rVert_2`; l1 the sign of the
    :math:`k` largest entries that do not leave the box, times :math:`20 / k`, with :math:`k` drawn from 5 to 20 in
    every step (``l1_step="topk"``), or the l1 step of one coordinate with an exact projection onto ball and box
    (``l1_step="apgd"``).

    Paper: Towards Deep Learning Models Resistant to Adversarial Attacks (ICLR 2018); l1: Adversarial Robustness Against
    the Union of Multiple Perturbation Models (ICML 2020).

    Args:
        eps: Radius in raw units.
        step_size: Size :math:`\alpha` of a step; if None, ``2.5 * eps / steps``, and 0.05 for the l1 step ``"topk"``
            whatever the radius (scaled by the width of the box).
        steps: Number of steps.
        restarts: Number of starts; of each sample the first success is kept, else the start with the largest loss.
        random_start: True: uniform in the ball (l2, l1: uniform direction and radius). ``"gaussian"``: 0.001 times a
            standard normal, as TRADES does. False: the clean inputs.
        norm: Norm of the ball.
        targeted: Whether to reach the classes given as ``target``.
        loss: What is maximised; see :class:`~lightning_trust.attacks.Attack`.
        l1_step: The step where ``norm="l1"``. That of ``"topk"`` moves many entries by ``step_size`` each, so it is as
            many times as long: with a step that is large for one entry it leaps across the ball.
        batch_norm: Statistics that BatchNorm uses.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([x.sum(dim=1), -x.sum(dim=1)], dim=1)
        >>> PGD(eps=0.1, step_size=0.04, steps=10)(model, torch.full((1, 2), 0.5), torch.tensor([0]))
        tensor([[0.4000, 0.4000]])

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        restarts: int = 1,
        random_start: bool | Literal["gaussian"] = True,
        norm: Norm = "linf",
        targeted: bool = False,
        loss: LossName | Loss = "ce",
        l1_step: Literal["topk", "apgd"] = "topk",
        batch_norm: Literal["eval", "batch"] = "eval",
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(eps, norm, targeted, loss, batch_norm, space, batch_size)
        check_counts(steps=steps, restarts=restarts)
        check_positive(step_size=step_size)
        if random_start not in (True, False, "gaussian"):
            raise ValueError(f"Expected argument `random_start` to be a bool or 'gaussian', but got {random_start!r}.")
        if l1_step not in ("topk", "apgd"):
            raise ValueError(f"Expected argument `l1_step` to be 'topk' or 'apgd', but got {l1_step!r}.")
        self.eps: float = eps
        self.step_size = step_size
        self.steps = steps
        self.restarts = restarts
        self.random_start = random_start
        self.l1_step = l1_step

    def _perturb(self, problem: Problem) -> Tensor:
        if self.restarts == 1:
            return self._ascend(problem, self._start(problem))
        remaining = Remaining(problem.inputs.clone())
        held = problem.inputs.new_full((len(problem),), -torch.inf)
        named = not callable(self.loss) and self.loss != "kl"
        for _ in range(self.restarts):
            found = self._ascend(problem, self._start(problem))
            outputs = problem.outputs(found)
            values = self.values(outputs, problem).detach()
            # a success is never given up, not even for another
            won = problem.fooled(outputs) if named else torch.zeros_like(held, dtype=torch.bool)
            values = torch.where(won, torch.inf, values)
            better = values > held
            remaining.put(better, found)
            held = torch.where(better, values, held)
            # who has won needs no other start; but statistics of a batch are those of all its samples
            if self.batch_norm == "eval" and bool(won.any()):
                stay = remaining.drop(won)
                if not len(stay):
                    break
                problem, held = problem.rows(stay), held[stay]
        return remaining.found

    def _start(self, problem: Problem) -> Tensor:
        x, draws, shape = problem.inputs, problem.draws, problem.inputs.shape[1:]
        if self.random_start is False:
            return x
        if self.random_start == "gaussian":
            return problem.clip(x + 0.001 * draws.normal(*shape))
        return problem.clip(x + random_in_ball(draws, x, self.eps, self.norm))

    def _ascend(self, problem: Problem, start: Tensor) -> Tensor:
        x, moved = problem.inputs, start
        size = step_of(self.step_size, self.eps, self.steps, self.norm, self.l1_step, problem)
        if self.norm == "linf":
            # ball and box at once
            lowest, highest = problem.clip(x - self.eps), problem.clip(x + self.eps)
            for step in range(self.steps):
                gradient, _, _ = self.gradient(problem, moved, step)
                moved = torch.clamp(torch.add(moved.detach(), gradient.sign(), alpha=size), lowest, highest)
            return moved
        for step in range(self.steps):
            gradient, _, _ = self.gradient(problem, moved, step)
            moved = ball_step(problem, moved, gradient, self.eps, size, self.norm, self.l1_step)
        return moved


class MIFGSM(Attack):
    r"""Momentum iterative FGSM: steps along the sign of an accumulated gradient.

    .. math:: m_{t+1} = \mu \, m_t + \frac{g_t}{\mathrm{mean} |g_t|}, \qquad
        x_{t+1} = \mathrm{clip}(x + \mathrm{clamp}(x_t + \alpha \, \mathrm{sign}(m_{t+1}) - x, -\epsilon, \epsilon))

    Paper: Boosting Adversarial Attacks with Momentum (CVPR 2018), which divides by the l1 norm: the same step.

    Args:
        eps: Radius in raw units.
        step_size: Size :math:`\alpha` of a step; ``eps / steps`` if None, as in the paper.
        steps: Number of steps.
        decay: Decay :math:`\mu` of the momentum.
        targeted: Whether to reach the classes given as ``target``.
        loss: What is maximised; see :class:`~lightning_trust.attacks.Attack`.
        batch_norm: Statistics that BatchNorm uses.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> MIFGSM(eps=0.1, steps=5).decay
        1.0

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        targeted: bool = False,
        loss: LossName | Loss = "ce",
        batch_norm: Literal["eval", "batch"] = "eval",
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(eps, "linf", targeted, loss, batch_norm, space, batch_size)
        check_counts(steps=steps)
        check_positive(step_size=step_size)
        if not decay >= 0.0:
            raise ValueError(f"Expected argument `decay` to be at least 0, but got {decay}.")
        self.eps: float = eps
        self.step_size = step_size
        self.steps = steps
        self.decay = decay

    def _perturb(self, problem: Problem) -> Tensor:
        x = moved = problem.inputs
        size = self.eps / self.steps if self.step_size is None else self.step_size
        lowest, highest = problem.clip(x - self.eps), problem.clip(x + self.eps)
        momentum = torch.zeros_like(x)
        for step in range(self.steps):
            gradient, _, _ = self.gradient(problem, moved, step)
            # a sample without a gradient goes on along what it has
            scale = gradient.abs().flatten(1).mean(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
            momentum = self.decay * momentum + gradient / per_sample(scale, gradient)
            moved = torch.clamp(moved + size * momentum.sign(), lowest, highest)
        return moved


def step_of(step_size: float | None, eps: float, steps: int, norm: Norm, l1_step: str, problem: Problem) -> float:
    """Size of a step: as given, or the usual one."""
    if step_size is not None:
        return step_size
    if norm == "l1" and l1_step == "topk":
        return 0.05 * (problem.high - problem.low)
    return 2.5 * eps / steps


def random_in_ball(draws: SampleDraws, like: Tensor, eps: float, norm: Norm) -> Tensor:
    """A random point of a ball a sample: uniform (linf), else a uniform direction times a uniform radius."""
    shape = like.shape[1:]
    if norm == "linf":
        return (2.0 * draws.uniform(*shape) - 1.0) * eps
    # exponential magnitudes with random signs, scaled to length one, are uniform on the l1 sphere
    direction = draws.normal(*shape) if norm == "l2" else torch.log1p(-draws.uniform(*shape)) * draws.signs(*shape)
    length = norm_of(direction, norm).clamp_min(1e-12)
    return direction * per_sample(draws.uniform() * eps / length, like)


def ball_step(
    problem: Problem, moved: Tensor, gradient: Tensor, eps: float, size: float, norm: Norm, l1_step: str
) -> Tensor:
    """One ascent step of a norm, projected on its ball and the box."""
    x = problem.inputs
    if norm == "linf":
        return problem.clip(x + project(moved + size * gradient.sign() - x, eps, "linf"))
    if norm == "l2":
        direction = gradient / per_sample(norm_of(gradient, "l2") + 1e-10, gradient)
        return problem.clip(x + project(moved + size * direction - x, eps, "l2"))
    if l1_step == "apgd":
        flat = gradient.flatten(1)
        largest = flat.abs().argmax(dim=1, keepdim=True)
        direction = torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign()).view_as(x)
        return x + project_l1_box(x, moved + size * direction - x, eps, problem.low, problem.high)
    return problem.clip(x + project(moved + size * topk_direction(problem, moved, gradient) - x, eps, "l1"))


def topk_direction(problem: Problem, moved: Tensor, gradient: Tensor) -> Tensor:
    r"""Sparse ascent direction of length 20 in l1: the sign of the k largest entries that stay off the box's faces.

    k is uniform from 5 to 20, drawn for every sample.
    """
    width = problem.high - problem.low
    stuck = (moved <= problem.low + _GAP * width) & (gradient < 0)
    stuck |= (moved >= problem.high - _GAP * width) & (gradient > 0)
    flat = gradient.masked_fill(stuck, 0.0).flatten(1)
    most = min(20, flat.shape[1])
    least = min(5, most)
    count = problem.draws.integers(least, most + 1)[:, None]
    places = flat.abs().topk(most, dim=1).indices
    chosen = (torch.arange(most, device=flat.device) < count).to(flat.dtype)
    direction = flat.gather(1, places).sign() * chosen * (20.0 / count)
    return torch.zeros_like(flat).scatter_(1, places, direction).view_as(gradient)
