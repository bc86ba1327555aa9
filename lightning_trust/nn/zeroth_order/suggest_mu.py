"""Which step is long enough for a solver's noise and short enough for its curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_trust.functional.zeroth_order import coordinate_vjp
from lightning_trust.nn.zeroth_order.simulator import Simulator


@dataclass(frozen=True)
class MuSuggestion:
    """What the differences of different steps say.

    Attributes:
        mu: The step to take.
        grid: Steps that were tried, ascending.
        errors: How far the Jacobian by each step is from those by the steps beside it, relative to its size: large
            where differences drown in noise (short steps) and where the box curves (long ones).
        queries: Points that were asked.

    """

    mu: float
    grid: tuple[float, ...]
    errors: tuple[float, ...]
    queries: int

    def plot(self, axes: Any = None) -> Any:
        """Draw the errors over the grid, on matplotlib axes; returns the axes."""
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.figure().add_subplot()
        axes.loglog(self.grid, self.errors, marker="o")
        axes.axvline(self.mu, linestyle="--")
        axes.set_xlabel("mu")
        axes.set_ylabel("relative error of the Jacobian")
        return axes


def suggest_mu(
    fn: Simulator | Callable[..., Any] | str,
    z: Tensor,
    out_dim: int = 1,
    scale: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    grid: Sequence[float] | None = None,
) -> MuSuggestion:
    r"""The step of central differences at which a black box's Jacobian depends least on the step.

    Differences by a step below the noise :math:`\varepsilon` of a solver have an error of :math:`\varepsilon / \mu`,
    those by long steps one of :math:`\mu^2`; in between lies a plateau, whose lowest point is suggested.

    Args:
        fn: The black box; see :class:`~lightning_trust.nn.BlackBoxLayer`.
        z: Typical points, shape ``(B, d)``; a few will do: each costs ``2 d`` answers a step.
        out_dim: Numbers in an answer.
        scale: The unit of each coordinate, shape ``(d,)``; 1 if None. Take what the layer will take.
        bounds: Lowest and highest value of each coordinate.
        grid: Steps to try; 17 from 1e-8 to 1 if None.

    Raises:
        ValueError: If the grid has fewer than three positive steps.

    Example:
        >>> rounded = lambda z: (z.sum(axis=1) ** 2).round(6)
        >>> suggest_mu(rounded, torch.tensor([[0.3, 1.0]])).mu >= 0.01
        True

    """
    steps = sorted(grid) if grid is not None else [10.0 ** (-8.0 + 0.5 * place) for place in range(17)]
    if len(steps) < 3 or not steps[0] > 0.0:
        raise ValueError(f"Expected argument `grid` to have at least three positive steps, but got {grid}.")
    simulator = fn if isinstance(fn, Simulator) else Simulator(fn, out_dim=out_dim)
    points = z.detach().to(device="cpu", dtype=torch.float64)
    before = simulator.counts.queries
    jacobians = [_jacobian(simulator, points, mu, scale, bounds) for mu in steps]
    sizes = [float(jacobian.norm()) for jacobian in jacobians]
    apart = [
        float((jacobians[place + 1] - jacobians[place]).norm()) / max(*sizes[place : place + 2], 1e-300)
        for place in range(len(steps) - 1)
    ]
    # steps so short that no answer changes agree on nothing
    lost = [size == 0.0 and max(sizes) > 0.0 for size in sizes]
    # both neighbours have to agree: one may be near by chance
    errors = [
        math.inf if lost[place] else max(apart[max(0, place - 1)], apart[min(place, len(apart) - 1)])
        for place in range(len(steps))
    ]
    best = min(range(len(steps)), key=lambda place: errors[place])
    return MuSuggestion(steps[best], tuple(steps), tuple(errors), simulator.counts.queries - before)


def _jacobian(
    simulator: Simulator, points: Tensor, mu: float, scale: Tensor | None, bounds: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Shape ``(m, B, d)``; every output asks the same questions, which are put once."""
    known: dict[bytes, Tensor] = {}

    def answers(asked: Tensor, samples: Tensor) -> Tensor:
        key = asked.numpy().tobytes()
        if key not in known:
            seeds = np.zeros(len(asked), dtype=np.int64) if simulator.seeded else None
            known[key] = torch.from_numpy(simulator.ask(asked.numpy(), seeds).values)
        return known[key]

    outputs = torch.eye(simulator.out_dim, dtype=torch.float64)
    rows = [
        coordinate_vjp(answers, points, output.expand(len(points), -1), mu, scale=scale, bounds=bounds).gradient
        for output in outputs
    ]
    return torch.stack(rows)
