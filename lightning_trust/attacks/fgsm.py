"""Attacks of one gradient step."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_trust.attacks.attack import Attack, Loss, LossName, Problem
from lightning_trust.attacks.preparation import check_counts, check_positive
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import Norm, linear_minimiser, project_linf


class FGSM(Attack):
    r"""Fast gradient sign method: one step to the surface of the ball.

    .. math:: x' = \mathrm{clip}(x + \epsilon \, \mathrm{sign}(\nabla_x \ell(f(x), y)))

    For other norms the step is the direction in which the linearised loss rises most.

    Paper: Explaining and Harnessing Adversarial Examples (ICLR 2015).

    Args:
        eps: Radius in raw units.
        norm: Norm of the ball.
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
        >>> FGSM(eps=0.1)(model, torch.full((1, 2), 0.5), torch.tensor([0]))
        tensor([[0.4000, 0.4000]])

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        norm: Norm = "linf",
        targeted: bool = False,
        loss: LossName | Loss = "ce",
        batch_norm: Literal["eval", "batch"] = "eval",
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(eps, norm, targeted, loss, batch_norm, space, batch_size)
        self.eps: float = eps

    def _perturb(self, problem: Problem) -> Tensor:
        gradient, _, _ = self.gradient(problem, problem.inputs)
        return problem.clip(problem.inputs - self.eps * linear_minimiser(gradient, self.norm))


class RFGSM(Attack):
    r"""FGSM from a random point: a step along random signs, then l-infinity steps of the same size.

    .. math:: x_0 = \mathrm{clip}(x + \alpha \, \mathrm{sign}(\mathcal{N}(0, I))), \qquad
        x_{t+1} = \mathrm{clip}(x + \mathrm{clamp}(x_t + \alpha \, \mathrm{sign}(\nabla \ell) - x, -\epsilon, \epsilon))

    Paper: Ensemble Adversarial Training: Attacks and Defenses (ICLR 2018), with one step.

    Args:
        eps: Radius in raw units.
        step_size: Size :math:`\alpha` of a step; half of ``eps`` if None.
        steps: Number of gradient steps.
        targeted: Whether to reach the classes given as ``target``.
        loss: What is maximised; see :class:`~lightning_trust.attacks.Attack`.
        batch_norm: Statistics that BatchNorm uses.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> RFGSM(eps=0.1).step_size
        0.05

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 1,
        targeted: bool = False,
        loss: LossName | Loss = "ce",
        batch_norm: Literal["eval", "batch"] = "eval",
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(eps, "linf", targeted, loss, batch_norm, space, batch_size)
        check_counts(steps=steps)
        check_positive(step_size=step_size)
        self.eps: float = eps
        self.step_size = eps / 2 if step_size is None else step_size
        self.steps = steps

    def _perturb(self, problem: Problem) -> Tensor:
        x = problem.inputs
        moved = problem.clip(x + self.step_size * problem.draws.signs(*x.shape[1:]))
        for step in range(self.steps):
            gradient, _, _ = self.gradient(problem, moved, step)
            moved = problem.clip(x + project_linf(moved + self.step_size * gradient.sign() - x, self.eps))
        return moved


class FastFGSM(Attack):
    r"""FGSM from a uniform random point of the ball, with a step that may leave it and is projected back.

    .. math:: \delta_0 \sim U(-\epsilon, \epsilon), \qquad
        \delta = \mathrm{clamp}(\delta_0 + \alpha \, \mathrm{sign}(\nabla \ell(\mathrm{clip}(x + \delta_0))),
        -\epsilon, \epsilon)

    Paper: Fast is better than free: Revisiting adversarial training (ICLR 2020).

    Args:
        eps: Radius in raw units.
        step_size: Size :math:`\alpha` of the step; ``1.25 * eps`` if None.
        random_start: Whether to start at random; else at the clean inputs.
        targeted: Whether to reach the classes given as ``target``.
        loss: What is maximised; see :class:`~lightning_trust.attacks.Attack`.
        batch_norm: Statistics that BatchNorm uses.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> FastFGSM(eps=0.08).step_size
        0.1

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float | None = None,
        random_start: bool = True,
        targeted: bool = False,
        loss: LossName | Loss = "ce",
        batch_norm: Literal["eval", "batch"] = "eval",
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(eps, "linf", targeted, loss, batch_norm, space, batch_size)
        check_positive(step_size=step_size)
        self.eps: float = eps
        self.step_size = 1.25 * eps if step_size is None else step_size
        self.random_start = random_start

    def _perturb(self, problem: Problem) -> Tensor:
        x = problem.inputs
        start = x
        if self.random_start:
            start = problem.clip(x + (2.0 * problem.draws.uniform(*x.shape[1:]) - 1.0) * self.eps)
        gradient, _, _ = self.gradient(problem, start)
        return problem.clip(x + project_linf(start + self.step_size * gradient.sign() - x, self.eps))
