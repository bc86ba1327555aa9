"""DeepFool: steps onto the nearest linearised boundary."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_trust.attacks.attack import Problem
from lightning_trust.attacks.preparation import check_counts
from lightning_trust.attacks.search import Remaining, SearchAttack
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import norm_of, per_sample

# length of the shortest step, in units of rounding an entry
_UNITS = 8.0


class DeepFool(SearchAttack):
    r"""DeepFool: while a sample is right, a step a little beyond the nearest linearised l2 boundary.

    .. math:: x \leftarrow \mathrm{clip}\Big(x + (1 + o) \frac{|f_k - f_y|}{\lVert w_k \rVert_2^2} w_k\Big), \qquad
        w_k = \nabla f_k - \nabla f_y, \quad k = \arg\min_{k \ne y} \frac{|f_k - f_y|}{\lVert w_k \rVert_2}

    A sample leaves the batch when it is misclassified. There is no ball: the last point is returned, won or not. No
    step is shorter than a few units of rounding: where the box cuts steps off, they would end on the boundary, where
    two logits tie and the formula does not move any more.

    Paper: DeepFool: a simple and accurate method to fool deep neural networks (CVPR 2016).

    Args:
        steps: Number of steps at most.
        overshoot: Share :math:`o` by which a step goes beyond the boundary, at least 0.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([x.sum(dim=1), 1.8 - x.sum(dim=1)], dim=1)
        >>> DeepFool()(model, torch.full((1, 2), 0.5), torch.tensor([1]))
        tensor([[0.5000, 0.5000]])
        >>> DeepFool()(model, torch.full((1, 2), 0.95), torch.tensor([0]))
        tensor([[0.4400, 0.4400]])

    """

    def __init__(
        self,
        steps: int = 50,
        overshoot: float = 0.02,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(None, "l2", False, "margin", "eval", space, batch_size)
        check_counts(steps=steps)
        if not overshoot >= 0.0:
            raise ValueError(f"Expected argument `overshoot` to be at least 0, but got {overshoot}.")
        self.steps = steps
        self.overshoot = overshoot

    def search(self, problem: Problem, outputs: Tensor) -> Tensor:
        """Perturbed inputs of samples that the network gets right; see the base."""
        moved = problem.inputs
        remaining = Remaining(moved.clone())
        for step in range(self.steps + 1):
            if step:
                done = problem.outputs(moved).argmax(dim=1) != problem.targets
                remaining.put(torch.ones_like(done), moved)
                stay = remaining.drop(done)
                if step == self.steps or not len(stay):
                    break
                if len(stay) < len(problem):
                    problem, moved = problem.rows(stay), moved[stay]
            moved = problem.clip(moved + (1.0 + self.overshoot) * self._to_boundary(problem, moved, step))
        return remaining.found

    def _to_boundary(self, problem: Problem, moved: Tensor, step: int) -> Tensor:
        ahead, slopes = lead_slopes(problem, moved)
        if problem.check and not bool(torch.isfinite(slopes).all()):
            raise RuntimeError(f"DeepFool got a gradient with NaN or infinite values in step {step}.")
        lengths = torch.stack([norm_of(slope, "l2") for slope in slopes], dim=1).clamp_min(1e-12)
        distances = (ahead.abs() / lengths).scatter(1, problem.targets[:, None], torch.inf)
        distance, nearest = distances.min(dim=1)
        rows = torch.arange(len(moved), device=moved.device)
        slope = slopes[nearest, rows]
        rounding = torch.finfo(moved.dtype).eps * max(abs(problem.low), abs(problem.high))
        distance = distance.clamp_min(_UNITS * rounding * moved[0].numel() ** 0.5)
        return slope * per_sample(distance / lengths[rows, nearest], slope)


def lead_slopes(problem: Problem, moved: Tensor) -> tuple[Tensor, Tensor]:
    """How far each logit is above that of the target, ``(N, K)``, and its slopes, ``(K, N, ...)``.

    One forward pass, and a backward pass a class.
    """
    place = moved.detach().requires_grad_()
    outputs = problem.model(place)
    classes = outputs.shape[1]
    ahead = outputs - outputs.gather(1, problem.targets[:, None])
    slopes = [
        torch.autograd.grad(ahead[:, index].sum(), place, retain_graph=index < classes - 1)[0]
        for index in range(classes)
    ]
    return ahead.detach(), torch.stack(slopes)
