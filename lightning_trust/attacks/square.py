"""Square attack: random search with square windows, on scores alone."""

from __future__ import annotations

import bisect
import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_trust.attacks.attack import Problem
from lightning_trust.attacks.preparation import check_counts, check_shares
from lightning_trust.attacks.search import Remaining, SearchAttack
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import Norm, norm_of, per_sample, project_l1_box

# after these iterations (of 10,000) the share of the image that a window covers is halved
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_BLOCK = 64


class Square(SearchAttack):
    r"""Square attack: windows at random places are kept where they lower the margin.

    linf: from random vertical stripes of :math:`\pm\epsilon`, each query sets a window, channel by channel, to
    :math:`+\epsilon` or :math:`-\epsilon`. l2 and l1: from a tiling by bumps, each query clears one window and moves
    its mass, and what is left of the budget, to another, in the form of a bump. It asks for outputs only, no gradient.

    The windows shrink on a schedule. Windows differ from sample to sample; a window that would change nothing is not
    asked for. A sample leaves the batch when it is misclassified. After a call, ``queries`` tells how often the network
    was asked about each sample, the clean input included.

    Paper: Square Attack: a query-efficient black-box adversarial attack via random search (ECCV 2020).

    Args:
        eps: Radius in raw units.
        norm: Norm of the ball.
        n_queries: Number of windows tried a restart, at least 1.
        p_init: Share of the image that the first windows cover, in (0, 1].
        loss: What a kept window must lower: ``"margin"`` or ``"ce"`` (cross-entropy, raised).
        resc_schedule: Whether the schedule, made for 10,000 queries, is scaled to ``n_queries``.
        restarts: Number of random starts, at least 1.
        targeted: Whether to reach the classes given as ``target``.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range, or the inputs are no images ``(N, C, H, W)``.

    Example:
        >>> import torch
        >>> model = lambda x: torch.stack([x.sum(dim=(1, 2, 3)), 3.2 - x.sum(dim=(1, 2, 3))], dim=1)
        >>> attack = Square(eps=0.2, n_queries=50)
        >>> inputs = torch.full((1, 1, 2, 2), 0.5)
        >>> bool(model(attack(model, inputs, torch.tensor([0]))).argmax() == 1)
        True

    """

    black_box = True

    def __init__(
        self,
        eps: float = 8 / 255,
        norm: Norm = "linf",
        n_queries: int = 5000,
        p_init: float = 0.8,
        loss: Literal["margin", "ce"] = "margin",
        resc_schedule: bool = True,
        restarts: int = 1,
        targeted: bool = False,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        if loss not in ("margin", "ce"):
            raise ValueError(f"Expected argument `loss` to be 'margin' or 'ce', but got {loss!r}.")
        super().__init__(eps, norm, targeted, loss, "eval", space, batch_size)
        check_counts(n_queries=n_queries, restarts=restarts)
        check_shares(p_init=p_init)
        self.eps: float = eps
        self.n_queries = n_queries
        self.p_init = p_init
        self.resc_schedule = resc_schedule
        self.restarts = restarts

    def share(self, query: int) -> float:
        """Share of the image that a window covers in a query."""
        if self.resc_schedule:
            query = int(query / self.n_queries * 10000)
        return self.p_init / 2.0 ** bisect.bisect_left(_HALVINGS, query)

    def search(self, problem: Problem, outputs: Tensor) -> Tensor:
        """Perturbed inputs of samples that the network gets right; see the base."""
        if problem.inputs.ndim != 4:
            raise ValueError(
                f"Expected images of shape (N, C, H, W) for Square, but got shape {tuple(problem.inputs.shape)}."
            )
        remaining = Remaining(problem.inputs.clone())
        for restart in range(self.restarts):
            # a stream of its own: how far the last one went depends on when samples left
            found, broken = self._run(replace(problem, draws=problem.draws.stream("restart", restart)))
            remaining.put(torch.ones_like(broken), found)
            stay = remaining.drop(broken)
            if not len(stay):
                break
            problem = problem.rows(stay)
        return remaining.found

    def _run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        remaining = Remaining(problem.inputs.clone())
        broken = torch.zeros(len(problem), dtype=torch.bool, device=problem.inputs.device)
        x, best = problem.inputs, self._start(problem)
        lowest, highest = problem.clip(x - self.eps), problem.clip(x + self.eps)
        # drawn for many queries at a time: a call costs more than its numbers
        bits = problem.targets.new_empty(len(problem), 0)
        outputs = problem.outputs(best)
        value, done = self.values(outputs, problem), problem.fooled(outputs)
        for query in range(self.n_queries + 1):
            if bool(done.any()):
                remaining.put(done, best)
                broken[remaining.rows[done]] = True
                stay = remaining.drop(done)
                if not len(stay):
                    return remaining.found, broken
                problem, best, value, done, bits = problem.rows(stay), best[stay], value[stay], done[stay], bits[stay]
                x, lowest, highest = problem.inputs, lowest[stay], highest[stay]
            if query == self.n_queries:
                break
            turn = query % _BLOCK
            if not turn:
                bits = problem.draws.bits(_BLOCK, 5 + x.shape[1])
            new = self._proposal(problem, lowest, highest, best, bits[:, turn], query)
            places = (new != best).flatten(1).any(dim=1).nonzero().squeeze(1)
            if not len(places):
                continue
            whole = len(places) == len(problem)
            some, points = (problem, new) if whole else (problem.rows(places), new[places])
            outputs = some.outputs(points)
            values, fooled = self.values(outputs, some), some.fooled(outputs)
            kept = (fooled | (values > (value if whole else value[places]))).nonzero().squeeze(1)
            if len(kept):
                rows = kept if whole else places[kept]
                best[rows], value[rows], done[rows] = points[kept], values[kept], fooled[kept]
        remaining.put(torch.ones_like(done), best)
        return remaining.found, broken

    def _start(self, problem: Problem) -> Tensor:
        x = problem.inputs
        _, channels, height, width = x.shape
        if self.norm == "linf":
            return problem.clip(x + self.eps * problem.draws.signs(channels, 1, width).to(x.dtype))
        side = max(1, height // 5, width // 5) if min(height, width) >= 5 else 1
        side = min(side, height, width)
        rows, columns = min(5, height // side), min(5, width // side)
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        signs = problem.draws.signs(rows * columns, channels).to(x.dtype)
        turned = problem.draws.signs(rows * columns) > 0
        form = _bump(side, self.norm, x)
        delta = torch.zeros_like(x)
        for tile in range(rows * columns):
            row, column = divmod(tile, columns)
            bump = torch.where(turned[:, tile, None, None], form, form.T)[:, None]
            delta[
                :, :, top + row * side : top + (row + 1) * side, left + column * side : left + (column + 1) * side
            ] += bump * signs[:, tile, :, None, None]
        return self._fitted(problem, delta)

    def _fitted(self, problem: Problem, delta: Tensor) -> Tensor:
        """A perturbation of l2 or l1 as large as the ball lets it be, added to the inputs and kept in the box."""
        x = problem.inputs
        if self.norm == "l1":
            return x + project_l1_box(x, delta, self.eps * (1.0 - 1e-6), problem.low, problem.high)
        return problem.clip(x + delta * per_sample(self.eps / norm_of(delta, "l2").clamp_min(1e-12), x))

    def _proposal(
        self, problem: Problem, lowest: Tensor, highest: Tensor, best: Tensor, bits: Tensor, query: int
    ) -> Tensor:
        x = problem.inputs
        _, channels, height, width = x.shape
        side = math.sqrt(self.share(query) * height * width)
        if self.norm == "linf":
            size = min(max(round(side), 1), height, width)
            inside = _window(bits[:, 0], bits[:, 1], size, height, width)
            up = (bits[:, 5:] >> 40 & 1).bool()[:, :, None, None]
            return torch.where(inside, torch.where(up, highest, lowest), best)
        size = max(round(side), 3)
        size = min(size + 1 - size % 2, height, width)
        signs = ((bits[:, 5:] >> 40 & 1).to(x.dtype) * 2.0 - 1.0)[:, :, None, None]
        to, cleared = (_window(bits[:, at], bits[:, at + 1], size, height, width) for at in (0, 2))
        form = _bump(size, self.norm, x)
        bump = torch.where((bits[:, 4] >> 40 & 1).bool()[:, None, None], form, form.T)[:, None]
        delta = best - x
        power = 2.0 if self.norm == "l2" else 1.0
        places = to.flatten(1).nonzero()[:, 1].view(len(x), 1, -1).expand(-1, channels, -1)

        def mass(values: Tensor) -> Tensor:
            """Sum of powers, a channel."""
            return values.abs().pow(power).sum(dim=(-2, -1), keepdim=True)

        old = delta.flatten(2).gather(2, places).view(len(x), channels, size, size)
        new = bump * signs + old / (mass(old).pow(1.0 / power) + 1e-12)
        whole = per_sample(norm_of(delta, self.norm), x).pow(power)
        budget = (self.eps**power - whole).clamp_min(0.0) / channels + mass(delta * (to | cleared))
        if self.norm == "l1":
            budget = budget * channels
        new = new / (mass(new).pow(1.0 / power) + 1e-12) * budget.pow(1.0 / power)
        delta = delta.masked_fill(cleared, 0.0).flatten(2).scatter(2, places, new.flatten(2)).view_as(x)
        return self._fitted(problem, delta)


def _window(top: Tensor, left: Tensor, size: int, height: int, width: int) -> Tensor:
    """Square windows at places drawn as bits: boolean, shape ``(N, 1, height, width)``."""
    top, left = (top % (height - size + 1))[:, None], (left % (width - size + 1))[:, None]
    row, column = torch.arange(height, device=top.device), torch.arange(width, device=top.device)
    rows = (row >= top) & (row < top + size)
    columns = (column >= left) & (column < left + size)
    return rows[:, None, :, None] & columns[:, None, None, :]


def _bump(size: int, norm: Norm, like: Tensor) -> Tensor:
    """Two halves of opposite sign, each falling from its middle, of length one: shape ``(size, size)``."""
    upper = size // 2
    power = 2.0 if norm == "l2" else 4.0
    halves = [_hill(upper, size, power), -_hill(size - upper, size, power)] if upper else [-_hill(size, size, power)]
    # each half counts the same
    halves = [half / _length(half, norm) for half in halves]
    bump = torch.cat(halves)
    return (bump / _length(bump, norm)).to(like)


def _hill(height: int, width: int, power: float) -> Tensor:
    """Height of a place: the sum of ``1 / (k + 1)**power`` over the rings k at and beyond it."""
    rings = max(height // 2, width // 2) + 1
    row, column = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    heights = (torch.arange(1, rings + 1, dtype=torch.float32) ** -power).flip(0).cumsum(0).flip(0)
    return heights[torch.maximum(row[:, None], column[None, :]).clamp_max(rings - 1)]


def _length(values: Tensor, norm: Norm) -> Tensor:
    return norm_of(values[None], norm)
