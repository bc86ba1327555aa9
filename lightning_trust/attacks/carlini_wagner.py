"""Carlini and Wagner's l2 attack."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_trust.attacks.attack import Attack, Problem
from lightning_trust.attacks.preparation import check_counts, check_positive
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import per_sample

# the arc tangent is infinite on the faces of the box
_FACE = 1.0 - 1e-6


class CWL2(Attack):
    r"""Carlini and Wagner's l2 attack: a small perturbation that wins, by Adam without a ball.

    .. math:: \min_w \lVert x'(w) - x \rVert_2^2 +
        c \max\big(z_y(x'(w)) - \max_{k \ne y} z_k(x'(w)), -\kappa\big), \qquad
        x'(w) = \mathrm{low} + \tfrac12 (\mathrm{high} - \mathrm{low}) (\tanh w + 1)

    The successful point with the smallest l2 norm is returned; the clean input where there is none. In the loss, inputs
    and norm are scaled to a box of width one.

    Paper: Towards Evaluating the Robustness of Neural Networks (IEEE S&P 2017).

    Args:
        c: Weight of the margin; where it is searched for, the first one.
        kappa: Margin :math:`\kappa` by which the other class is to win, at least 0.
        steps: Number of Adam steps, for each weight.
        lr: Learning rate of Adam.
        binary_search_steps: How often the weight is changed, for each sample by itself: ten times as much until it
            succeeds, then by bisection. 0: ``c`` is used as it is; the paper has 9, from ``c=1e-3``.
        abort_early: Whether a search with one weight ends when the summed cost has not fallen over a tenth of its
            steps. The cost is that of the batch, so samples then depend on each other.
        targeted: Whether to reach the classes given as ``target``.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([4.0 * x.sum(dim=1), 3.0 + 0.0 * x.sum(dim=1)], dim=1)
        >>> found = CWL2(c=1.0, steps=200)(model, torch.full((1, 2), 0.5), torch.tensor([0]))
        >>> [round(value, 2) for value in found[0].tolist()]
        [0.37, 0.37]

    """

    def __init__(
        self,
        c: float = 1.0,
        kappa: float = 0.0,
        steps: int = 50,
        lr: float = 0.01,
        binary_search_steps: int = 0,
        abort_early: bool = False,
        targeted: bool = False,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(None, "l2", targeted, "margin", "eval", space, batch_size)
        check_counts(steps=steps)
        check_positive(c=c, lr=lr)
        if not kappa >= 0.0:
            raise ValueError(f"Expected argument `kappa` to be at least 0, but got {kappa}.")
        if binary_search_steps < 0:
            raise ValueError(
                f"Expected argument `binary_search_steps` to be at least 0, but got {binary_search_steps}."
            )
        self.c = c
        self.kappa = kappa
        self.steps = steps
        self.lr = lr
        self.binary_search_steps = binary_search_steps
        self.abort_early = abort_early

    def _perturb(self, problem: Problem) -> Tensor:
        x = problem.inputs
        found = x.clone()
        shortest = x.new_full((len(x),), torch.inf)
        weight = x.new_full((len(x),), self.c)
        lower, upper = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
        for _ in range(self.binary_search_steps + 1):
            points, lengths = self._descend(problem, weight)
            shorter = lengths < shortest
            found = torch.where(per_sample(shorter, x), points, found)
            shortest = torch.where(shorter, lengths, shortest)
            won = lengths.isfinite()
            upper, lower = torch.where(won, weight, upper), torch.where(won, lower, weight)
            weight = torch.where(upper.isfinite(), (lower + upper) / 2.0, 10.0 * lower)
        return found

    def _descend(self, problem: Problem, weight: Tensor) -> tuple[Tensor, Tensor]:
        """With given weights: the successful points of least norm, and their squared norms; infinite without one."""
        x, low, width = problem.inputs, problem.low, problem.high - problem.low
        start = (2.0 * (x - low) / width - 1.0).clamp(-_FACE, _FACE).atanh()
        place = start.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([place], lr=self.lr)
        best, shortest = x.clone(), x.new_full((len(x),), torch.inf)
        last = float("inf")
        for step in range(self.steps):
            unit = 0.5 * (place.tanh() + 1.0)
            point = low + width * unit
            length = (unit - (x - low) / width).square().flatten(1).sum(dim=1)
            outputs = problem.model(point)
            # what the base maximises is how far the other class is ahead
            lead = self.values(outputs, problem)
            cost = (length + weight * (-lead).clamp_min(-self.kappa)).sum()
            (place.grad,) = torch.autograd.grad(cost, place)
            if problem.check and not bool(torch.isfinite(place.grad).all()):
                raise RuntimeError(f"CWL2 got a gradient with NaN or infinite values in step {step}.")
            optimizer.step()
            with torch.no_grad():
                won = problem.fooled(outputs) & (lead >= self.kappa) & (length < shortest)
                best = torch.where(per_sample(won, x), point, best)
                shortest = torch.where(won, length, shortest)
            if self.abort_early and step % max(self.steps // 10, 1) == 0:
                now = cost.item()
                if now > last:
                    break
                last = now
        return problem.clip(best), shortest
