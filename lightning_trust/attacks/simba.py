"""SimBA: one orthonormal direction after the other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_trust.attacks.attack import Problem
from lightning_trust.attacks.preparation import check_counts, check_positive, check_shares
from lightning_trust.attacks.search import Remaining, SearchAttack
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.cosine_basis import dct_matrix
from lightning_trust.functional.adversarial.losses import check_classes


class SimBA(SearchAttack):
    r"""Simple black-box attack: a step along a basis vector is kept if it lowers the probability of the class.

    The vectors :math:`q` of an orthonormal basis are visited in a random order, each once: :math:`x + s q` is tried,
    then :math:`x - s q`, and the first that lowers :math:`p(y | x)` (or raises that of the class to be reached) is
    kept. Where the box does not clip, :math:`\lVert \delta \rVert_2 \le s \sqrt{\text{kept}}`; there is no other
    budget. A sample leaves the batch when it is misclassified or has spent its queries. After a call, ``queries`` tells
    how often the network was asked about each sample, the clean input included.

    Paper: Simple Black-box Adversarial Attacks (ICML 2019).

    Args:
        step: Length :math:`s` of a step, in raw units.
        max_queries: Most queries a sample, the clean input included.
        basis: ``"pixel"``: single entries. ``"dct"``: cosine waves, for images ``(N, C, H, W)``.
        frequency_share: For ``basis="dct"``, the share of the lowest frequencies of each dimension that is used.
        targeted: Whether to reach the classes given as ``target``.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range, or the inputs are no images where waves are asked for.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([x.sum(dim=1), 1.8 - x.sum(dim=1)], dim=1)
        >>> attack = SimBA(step=0.1)
        >>> found = attack(model, torch.full((1, 4), 0.25), torch.tensor([0]))
        >>> sorted(round(value, 2) for value in found[0].tolist())
        [0.15, 0.15, 0.25, 0.25]

    """

    black_box = True

    def __init__(
        self,
        step: float = 0.2,
        max_queries: int = 5000,
        basis: Literal["pixel", "dct"] = "pixel",
        frequency_share: float = 1.0,
        targeted: bool = False,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(None, "l2", targeted, "ce", "eval", space, batch_size)
        check_positive(step=step)
        check_counts(max_queries=max_queries)
        if basis not in ("pixel", "dct"):
            raise ValueError(f"Expected argument `basis` to be 'pixel' or 'dct', but got {basis!r}.")
        check_shares(frequency_share=frequency_share)
        self.step = step
        self.max_queries = max_queries
        self.basis = basis
        self.frequency_share = frequency_share

    def search(self, problem: Problem, outputs: Tensor) -> Tensor:
        """Perturbed inputs of samples that the network gets right; see the base."""
        moved, value = problem.inputs.clone(), self._odds(outputs, problem)
        remaining = Remaining(moved.clone())
        order = problem.draws.uniform(self._directions(moved)).argsort(dim=1)
        # the clean input was the first query
        spent = torch.ones_like(problem.targets)
        done = spent >= self.max_queries
        for at in range(order.shape[1] + 1):
            if bool(done.any()) or at == order.shape[1]:
                remaining.put(torch.ones_like(done), moved)
                stay = remaining.drop(done)
                if at == order.shape[1] or not len(stay):
                    break
                problem, order = problem.rows(stay), order[stay]
                moved, value, spent, done = moved[stay], value[stay], spent[stay], done[stay]
            direction = self._direction(order[:, at], moved)
            waiting = torch.ones_like(done)
            for sign in (1.0, -1.0):
                places = (waiting & ~done).nonzero().squeeze(1)
                if not len(places):
                    break
                some = problem.rows(places)
                points = problem.clip(moved[places] + sign * self.step * direction[places])
                outputs = some.outputs(points)
                values, fooled = self._odds(outputs, some), some.fooled(outputs)
                kept = fooled | (values > value[places])
                moved[places[kept]], value[places[kept]] = points[kept], values[kept]
                waiting[places[kept]] = False
                spent[places] += 1
                done[places] = fooled | (spent[places] >= self.max_queries)
        return remaining.found

    def _odds(self, outputs: Tensor, problem: Problem) -> Tensor:
        """Log-odds of what the attack wants: they rise as the probability does, and still where that rounds to 0."""
        wanted = problem.targets if problem.goal is None else problem.goal
        check_classes(outputs, 2, "ce")
        others = outputs.scatter(1, wanted[:, None], -torch.inf).logsumexp(dim=1)
        ahead = outputs.gather(1, wanted[:, None]).squeeze(1) - others
        return -ahead if problem.goal is None else ahead

    def _directions(self, x: Tensor) -> int:
        """How many there are."""
        if self.basis == "pixel":
            return x[0].numel()
        if x.ndim != 4:
            raise ValueError(
                f"Expected images of shape (N, C, H, W) for SimBA(basis='dct'), but got shape {tuple(x.shape)}."
            )
        rows, columns = self._frequencies(x)
        return x.shape[1] * rows * columns

    def _frequencies(self, x: Tensor) -> tuple[int, int]:
        return max(1, round(self.frequency_share * x.shape[2])), max(1, round(self.frequency_share * x.shape[3]))

    def _direction(self, index: Tensor, x: Tensor) -> Tensor:
        """A basis vector a sample, by its number."""
        if self.basis == "pixel":
            return torch.zeros_like(x).flatten(1).scatter_(1, index[:, None], 1.0).view_as(x)
        rows, columns = self._frequencies(x)
        channel, wave = index // (rows * columns), index % (rows * columns)
        down, across = (dct_matrix(size).to(x) for size in x.shape[2:])
        image = down[wave // columns][:, :, None] * across[wave % columns][:, None, :]
        direction = torch.zeros_like(x)
        direction[torch.arange(len(x), device=x.device), channel] = image
        return direction
