"""Attacks that estimate the gradient from scores: ZO-signSGD and NES."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_trust.attacks.attack import LossName, Problem
from lightning_trust.attacks.preparation import check_counts, check_positive
from lightning_trust.attacks.search import Remaining, SearchAttack
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import (
    Norm,
    norm_of,
    per_sample,
    project,
    project_l1_box,
)
from lightning_trust.functional.zeroth_order import central_difference_gradient, forward_difference_gradient


class _ZerothOrderAttack(SearchAttack):
    """What both share: ascent along an estimate, in a ball and the box, until misclassified."""

    black_box = True
    #: whether points come in pairs, so that their number is even
    _pairs = False

    def __init__(
        self,
        eps: float = 8 / 255,
        norm: Norm = "linf",
        steps: int = 500,
        lr: float = 5e-4,
        mu: float = 0.01,
        q: int = 10,
        loss: LossName = "ce",
        targeted: bool = False,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        if loss == "kl" or callable(loss):
            raise ValueError(f"Expected argument `loss` to be 'ce', 'dlr' or 'margin', but got {loss!r}.")
        super().__init__(eps, norm, targeted, loss, "eval", space, batch_size)
        check_counts(steps=steps, q=q)
        check_positive(lr=lr, mu=mu)
        if self._pairs and q % 2:
            raise ValueError(
                f"Expected argument `q` to be even for {type(self).__name__}, whose points come in pairs, but got {q}."
            )
        self.eps: float = eps
        self.steps = steps
        self.lr = lr
        self.mu = mu
        self.q = q

    def search(self, problem: Problem, outputs: Tensor) -> Tensor:
        """Perturbed inputs of samples that the network gets right; see the base."""
        moved = problem.inputs
        remaining = Remaining(moved.clone())
        for step in range(self.steps + 1):
            if step:
                outputs = problem.outputs(moved)
            done = problem.fooled(outputs)
            remaining.put(torch.ones_like(done), moved)
            stay = remaining.drop(done)
            if step == self.steps or not len(stay):
                break
            if len(stay) < len(problem):
                problem, moved, outputs = problem.rows(stay), moved[stay], outputs[stay]
            base = self.values(outputs, problem)
            some = problem

            def value(points: Tensor, some: Problem = some) -> Tensor:
                return self.values(some.outputs(points), some)

            moved = self._project(problem, moved + self.lr * self._direction(problem, moved, value, base))
        return remaining.found

    @abstractmethod
    def _direction(self, problem: Problem, moved: Tensor, value: Callable[[Tensor], Tensor], base: Tensor) -> Tensor:
        """What the points move along, ``lr`` times."""

    def _sphere(self, problem: Problem) -> Tensor:
        direction = problem.draws.normal(*problem.inputs.shape[1:]).to(problem.inputs.dtype)
        return direction / per_sample(norm_of(direction, "l2").clamp_min(1e-12), direction)

    def _project(self, problem: Problem, moved: Tensor) -> Tensor:
        x = problem.inputs
        if self.norm == "l1":
            return x + project_l1_box(x, moved - x, self.eps, problem.low, problem.high)
        return problem.clip(x + project(moved - x, self.eps, self.norm))


class ZOSignAttack(_ZerothOrderAttack):
    r"""Ascent along the sign of a gradient that is estimated from scores.

    .. math:: x \leftarrow P\big(x + \eta \, \mathrm{sign}(\hat g)\big), \qquad
        \hat g = \frac1q \sum_j \frac{L(x + \mu u_j) - L(x)}{\mu} u_j

    with :math:`u_j` uniform on the unit sphere. A step costs ``q + 1`` queries; points at which the network is asked
    may lie up to ``mu`` outside the box. A sample leaves the batch when it is misclassified. After a call, ``queries``
    tells how often the network was asked about each sample, the clean input included.

    Paper: signSGD via Zeroth-Order Oracle (ICLR 2019).

    Args:
        eps: Radius in raw units.
        norm: Norm of the ball.
        steps: Number of steps.
        lr: Size :math:`\eta` of a step, in raw units.
        mu: Length :math:`\mu` of a difference.
        q: Number of directions a step.
        loss: What is maximised: ``"ce"``, ``"dlr"`` or ``"margin"``.
        targeted: Whether to reach the classes given as ``target``.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([x.sum(dim=1), 1.8 - x.sum(dim=1)], dim=1)
        >>> attack = ZOSignAttack(eps=0.2, steps=40, lr=0.01)
        >>> found = attack(model, torch.full((1, 4), 0.25), torch.tensor([0]))
        >>> bool(model(found).argmax() == 1), attack.queries.tolist()
        (True, [34])

    """

    def _direction(self, problem: Problem, moved: Tensor, value: Callable[[Tensor], Tensor], base: Tensor) -> Tensor:
        directions = (self._sphere(problem) for _ in range(self.q))
        return forward_difference_gradient(value, moved, directions, self.mu, base).sign()


class NES(_ZerothOrderAttack):
    r"""Ascent along a gradient that is estimated from pairs of opposite points.

    .. math:: x \leftarrow P\Big(x + \eta \sqrt{n} \, \frac{\hat g}{\lVert \hat g \rVert_2}\Big), \qquad
        \hat g = \frac2q \sum_{j=1}^{q/2} \frac{L(x + \mu u_j) - L(x - \mu u_j)}{2 \mu} u_j

    with :math:`u_j` uniform on the unit sphere and :math:`n` the number of entries of an input. A step costs ``q + 1``
    queries, one of them to see whether the sample is misclassified; then it leaves the batch. Points at which the
    network is asked may lie up to ``mu`` outside the box. After a call, ``queries`` tells how often the network was
    asked about each sample, the clean input included.

    Paper: Black-box Adversarial Attacks with Limited Queries and Information (ICML 2018).

    Args:
        eps: Radius in raw units.
        norm: Norm of the ball.
        steps: Number of steps.
        lr: Size :math:`\eta` of a step: the root mean square of what an entry moves, in raw units.
        mu: Length :math:`\mu` of a difference.
        q: Number of points a step, even.
        loss: What is maximised: ``"ce"``, ``"dlr"`` or ``"margin"``.
        targeted: Whether to reach the classes given as ``target``.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([x.sum(dim=1), 1.8 - x.sum(dim=1)], dim=1)
        >>> attack = NES(eps=0.2, steps=40, lr=0.01)
        >>> found = attack(model, torch.full((1, 4), 0.25), torch.tensor([0]))
        >>> bool(model(found).argmax() == 1)
        True

    """

    _pairs = True

    def _direction(self, problem: Problem, moved: Tensor, value: Callable[[Tensor], Tensor], base: Tensor) -> Tensor:
        directions = (self._sphere(problem) for _ in range(self.q // 2))
        gradient = central_difference_gradient(value, moved, directions, self.mu)
        length = norm_of(gradient, "l2").clamp_min(1e-12)
        return gradient * per_sample(moved[0].numel() ** 0.5 / length, gradient)
