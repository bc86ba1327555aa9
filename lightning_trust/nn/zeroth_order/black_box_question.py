"""One call of a black box: what it was asked, and the estimate of a gradient from further answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lightning_trust.core.randomness import RandomStreams
from lightning_trust.functional.zeroth_order import VJPEstimate, coordinate_vjp, random_vjp
from lightning_trust.nn.zeroth_order.simulator import Simulator, SimulatorAnswers
from lightning_trust.nn.zeroth_order.simulator_attempts import quoted


@dataclass(frozen=True)
class EstimateSettings:
    """How a gradient is estimated.

    Args:
        estimator: Along coordinates or random directions.
        mu: Length of a step, in units of ``unit``.
        central: Whether differences are central.
        directions: Random directions a sample.
        unit: The unit of each coordinate; 1 if None.
        bounds: Lowest and highest value of each coordinate.
        rounding: Relative rounding error of the points, as they were before they became float64.
        seed: Seed of the directions.
        call: Number of the call, which places the directions in the run.

    """

    estimator: Literal["cge", "rge"]
    mu: float
    central: bool
    directions: int
    unit: Tensor | None
    bounds: tuple[Tensor, Tensor] | None
    rounding: float
    seed: int
    call: int


class Question:
    """The points of one call and their values, with the gradient of these for whoever wants it.

    Args:
        simulator: What is asked.
        points: Float64 on the CPU, shape ``(B, d)``.
        settings: How to estimate.
        known: What is asked beside each point and never moved, shape ``(B, k)``.
        losses: Answers ``(n, m)`` and their samples ``(n,)`` -> losses ``(n,)``, where these are the values.

    Attributes:
        values: Answers ``(B, m)`` or losses ``(B,)``.
        valid: Which points were answered, shape ``(B,)``.

    """

    def __init__(
        self,
        simulator: Simulator,
        points: Tensor,
        settings: EstimateSettings,
        known: Tensor | None = None,
        losses: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.simulator = simulator
        self.points = _inside(points, settings)
        self.settings = settings
        self.known = known
        self.losses = losses
        rows = len(points)
        self.streams = RandomStreams(settings.seed, "BlackBoxLayer")
        self.seeds = None
        if simulator.seeded:
            self.seeds = self.streams.samples(rows, "noise", settings.call).integers(0, 2**31).numpy()
        every = torch.arange(rows)
        answered = self._ask(self.points, every)
        self.valid = torch.from_numpy(answered.valid)
        self.values = self._values(torch.from_numpy(answered.values), every)

    def _ask(self, points: Tensor, samples: Tensor) -> SimulatorAnswers:
        asked = points if self.known is None else torch.cat([points, self.known[samples]], dim=1)
        return self.simulator.ask(asked.numpy(), None if self.seeds is None else self.seeds[samples.numpy()])

    @torch.no_grad()
    def _values(self, answers: Tensor, rows: Tensor) -> Tensor:
        return answers if self.losses is None else self.losses(answers, rows)

    def _answers(self, rows: Tensor, points: Tensor, samples: Tensor) -> Tensor:
        """Values at other points, as columns; ``samples`` count in ``rows``."""
        samples = rows[samples]
        found = self._ask(points, samples)
        values = _columns(self._values(torch.from_numpy(found.values), samples))
        # the nearest answer is none for a difference
        return torch.where(torch.from_numpy(found.valid).unsqueeze(1), values, torch.nan)

    @torch.no_grad()
    def estimate(self, cotangents: Tensor) -> VJPEstimate:
        """The gradient of the points from that of the values, in any type and on any device."""
        settings, count = self.settings, len(self.points)
        cotangents = cotangents.detach().to(device="cpu", dtype=torch.float64)
        cotangents = _columns(cotangents)
        # rows that do not count cost nothing, and those without an answer have no gradient
        rows = torch.nonzero(self.valid & (cotangents != 0.0).any(dim=1)).flatten()
        nothing = VJPEstimate(
            torch.zeros_like(self.points), 0, 0, torch.zeros(count, dtype=torch.long), snr=float("nan")
        )
        if not len(rows) and not self.simulator.rank_zero_service:
            return nothing
        unit = settings.unit
        common: dict[str, Any] = {
            "answers": lambda points, samples: self._answers(rows, points, samples),
            "points": self.points[rows],
            "cotangents": cotangents[rows],
            "mu": settings.mu,
            "base": _columns(self.values[rows]),
            "central": settings.central,
            "scale": unit,
            "bounds": settings.bounds,
        }
        if settings.estimator == "cge":
            found = coordinate_vjp(**common)
        else:
            draws = self.streams.samples(count, "directions", settings.call)
            directions = draws.normal(settings.directions, self.points.shape[1])
            found = random_vjp(**common, directions=directions[rows].double().transpose(0, 1))
        gradient, missing = nothing.gradient, nothing.missing
        gradient[rows], missing[rows] = found.gradient, found.missing
        return replace(found, gradient=gradient, missing=missing)


def _columns(values: Tensor) -> Tensor:
    """Float64 of shape ``(n, m)``; losses ``(n,)`` are one column."""
    return values.double() if values.ndim == 2 else values.double().unsqueeze(1)


def _inside(points: Tensor, settings: EstimateSettings) -> Tensor:
    """Points within the bounds; what rounding has carried beyond is put on them."""
    if settings.bounds is None:
        return points
    lowest, highest = settings.bounds
    room = 4.0 * settings.rounding * torch.maximum(lowest.abs(), highest.abs())
    outside = ~((points >= lowest - room) & (points <= highest + room)).all(dim=1)
    if bool(outside.any()):
        raise ValueError(
            f"Expected argument `z` to stay within the bounds {lowest.tolist()} to {highest.tolist()}, but got"
            f" {quoted(points[outside][0].numpy())}. Pass `squash=True` to map z into them."
        )
    return points.clamp(lowest, highest)


def with_gradient(z: Tensor, values: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """Values as a function of z whose backward pass is ``gradient``: that of the values -> that of z.

    Raises:
        RuntimeError: From a second backward pass through the first.

    """
    return cast(Tensor, _Estimated.apply(z, values, gradient))


class _Estimated(torch.autograd.Function):
    """Values that stand as they are, with a gradient by estimate."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.gradient = gradient
        ctx.like = (z.device, z.dtype)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (cotangents,) = gradients
        device, kind = ctx.like
        found = ctx.gradient(cotangents).to(device=device, dtype=kind)
        if torch.is_grad_enabled() and cotangents.requires_grad:
            found = cast(Tensor, _NoSecond.apply(found, cotangents))
        return found, None, None


class _NoSecond(torch.autograd.Function):
    """A gradient that cannot be differentiated, and says so."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, cotangents: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "BlackBoxLayer estimates first derivatives from answers of the black box; a second derivative through it is"
            " not supported. Leave the layer out of what is differentiated twice, or pass `direct=True` where the black"
            " box is differentiable code."
        )
