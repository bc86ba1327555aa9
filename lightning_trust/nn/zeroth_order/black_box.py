"""A black box as a layer: asked forward, differentiated by estimates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_trust.core.distributed import sum_over_ranks_
from lightning_trust.core.randomness import default_seed
from lightning_trust.nn.zeroth_order.black_box_question import EstimateSettings, Question, with_gradient
from lightning_trust.nn.zeroth_order.simulator import Executor, OnFailure, Simulator

Estimator = Literal["auto", "cge", "rge"]
Bound = float | Sequence[float]
_NOISY = 0.1
_MOMENTUM = 0.1
_COSTLY = 512


@dataclass
class BlackBoxStatistics:
    """What the estimates of a layer ran into, on this rank.

    Attributes:
        one_sided: Differences that became one-sided, at the bounds or for a missing answer.
        missing: Differences that were not made, for missing answers.
        snr: Signal to noise of the last estimate from random directions, see
            :class:`~lightning_trust.functional.zeroth_order.VJPEstimate`.

    """

    one_sided: int = 0
    missing: int = 0
    snr: float = float("nan")


class BlackBoxLayer(nn.Module):
    r"""An unmodified simulator, compiled program or rule base as a layer between layers.

    Forward asks it; backward estimates :math:`J_g(z)^\top v` from more answers, for every sample of its own, by
    differences along coordinates (CGE) or random directions (RGE): see
    :func:`~lightning_trust.functional.zeroth_order.coordinate_vjp` and
    :func:`~lightning_trust.functional.zeroth_order.random_vjp`. Everything before and after it is differentiated as
    usual, so that only the number of inputs of the black box matters. A sample costs one answer forward and

    ============ ======= =========
    \            central one-sided
    ============ ======= =========
    CGE          2 d     d
    RGE          2 q     q
    ============ ======= =========

    more backward, and none backward where its input needs no gradient. Under ``no_grad`` it is only asked forward.

    Paper: Zeroth-Order SciML: Non-intrusive Integration of Scientific Software with Deep Learning (arXiv 2206.02785).

    Shape:
        - z: ``(..., d)``, floating point, any device. The black box gets float64 on the CPU.
        - context: what else a sample has, each ``(..., *)``. With ``mode="vjp"`` inputs of the black box that are
          known, ``(..., k)``: it gets them beside z, they are not moved and have no gradient. With ``mode="loss"`` what
          ``downstream`` needs.
        - output: ``(..., m)`` in the type and on the device of z (float32 for half precision under autocast); with
          ``mode="loss"`` ``(...)``.

    Args:
        fn: The black box: a :class:`~lightning_trust.nn.Simulator`, a callable, or the import path of one, from float64
            arrays ``(n, d)`` to arrays ``(n, m)``, a row a sample.
        out_dim: Numbers in an answer, m.
        estimator: ``"cge"``; ``"rge"``; or ``"auto"``: CGE for ``d <= 8`` or ``d <= q``, else RGE.
        q: Random directions a sample.
        mu: Length of a step, in units of ``scale``.
        mode: ``"vjp"``, or ``"loss"``: differences of ``downstream(answers, *context)``, the loss of each sample, which
            need not be differentiable; the layer then returns these losses.
        central: Whether differences are central.
        scale: The unit of each coordinate: numbers, the same for all samples or one a coordinate; ``"batch"`` for their
            running standard deviation over the batches of all ranks, kept in the layer's state.
        bounds: Lowest and highest value that the black box takes, one for all coordinates or one each. No question
            leaves them, and a z that does is refused.
        squash: Whether z is mapped into the bounds first, by a sigmoid.
        in_dim: Numbers in a row of z, d; found at the first call if None.
        max_q: RGE doubles ``q`` up to this many directions whenever the estimate's ratio of signal to noise is below
            0.1; never if None.
        downstream: For ``mode="loss"``: answers ``(n, m)`` and rows of the context -> losses ``(n,)``.
        tensors: Whether ``fn`` takes and gives tensors, float64 on the CPU.
        direct: Whether ``fn`` is differentiable code: takes z itself, and autograd goes through it.
        seed: Seed of the directions; that of ``seed_everything`` if None. The number of the call is part of the key.
        cache: How many answers to remember.
        executor: ``"serial"``, ``"threads"`` or ``"processes"``.
        workers: Number of threads or processes.
        timeout: Seconds a call may take.
        on_failure: ``"raise"`` an error that quotes the row; ``"drop"``: the answer is NaN, ``valid`` tells the rows to
            leave out of the mean, and their z gets no gradient; ``"nearest"``: the answer of the nearest row that has
            one, without a gradient. A point of a difference that fails is done without: the difference becomes
            one-sided, or is left out.

    Attributes:
        valid: Which rows of the last call were answered, shape ``(...)``.
        simulator: What is asked; its ``counts`` tell how often. None with ``direct``.
        statistics: What the estimates ran into.

    Raises:
        ValueError: If a number is out of its range (at once); if z leaves the bounds or has another number of
            coordinates than before, or an answer has the wrong shape or is not finite (when it happens).
        SimulatorError: If the black box raises, hangs or dies; the message quotes the row.
        MisconfigurationException: If arguments do not go together.

    Warns:
        UserWarning: If CGE has more than 512 coordinates.

    Note:
        A second derivative is refused: estimates have none.

    Example:
        >>> layer = BlackBoxLayer("numpy.sin", out_dim=2, mu=1e-4)
        >>> z = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
        >>> layer(z).sum().backward()
        >>> z.grad
        tensor([[1.0000, 0.5403]], dtype=torch.float64)
        >>> layer.simulator.counts.queries
        5

    """

    calls: Tensor
    directions: Tensor
    variance: Tensor

    def __init__(
        self,
        fn: Simulator | Callable[..., Any] | str,
        out_dim: int = 1,
        estimator: Estimator = "auto",
        q: int = 10,
        mu: float = 1e-2,
        mode: Literal["vjp", "loss"] = "vjp",
        central: bool = True,
        scale: Literal["batch"] | float | Sequence[float] = "batch",
        bounds: tuple[Bound, Bound] | None = None,
        squash: bool = False,
        in_dim: int | None = None,
        max_q: int | None = None,
        downstream: Callable[..., Tensor] | None = None,
        tensors: bool = False,
        direct: bool = False,
        seed: int | None = None,
        cache: int = 0,
        executor: Executor = "serial",
        workers: int = 1,
        timeout: float | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        for name, value, least in (("out_dim", out_dim, 1), ("q", q, 1), ("in_dim", in_dim, 1), ("max_q", max_q, q)):
            if value is not None and value < least:
                raise ValueError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        if not mu > 0.0:
            raise ValueError(f"Expected argument `mu` to be positive, but got {mu}.")
        for name, chosen, known in (("estimator", estimator, get_args(Estimator)), ("mode", mode, ("vjp", "loss"))):
            if chosen not in known:
                raise ValueError(f"Expected argument `{name}` to be one of {list(known)}, but got {chosen!r}.")
        if (mode == "loss") != (downstream is not None):
            raise MisconfigurationException(
                "Expected argument `downstream` to be given with mode='loss', and with no other, but got"
                f" mode='{mode}', downstream={downstream!r}."
            )
        if squash and bounds is None:
            raise MisconfigurationException("Argument `squash` maps into the `bounds`, but got bounds=None.")
        self.out_dim = out_dim
        self.estimator: Estimator = estimator
        self.q = q
        self.mu = mu
        self.mode: Literal["vjp", "loss"] = mode
        self.central = central
        self.scale = "batch" if scale == "batch" else _positive(scale)
        self.bounds = None if bounds is None else _box(bounds)
        self.squash = squash
        self.in_dim = in_dim
        self.max_q = max_q
        self.downstream = downstream
        self.seed = seed
        self.direct = fn if direct else None
        settings = {
            "cache": cache,
            "executor": executor,
            "workers": workers,
            "timeout": timeout,
            "on_failure": on_failure,
        }
        self.simulator = None if direct else _simulator(fn, out_dim, tensors, settings)
        if direct and not callable(fn):
            raise MisconfigurationException(f"direct=True needs `fn` to be a callable, but got {fn!r}.")
        self.statistics = BlackBoxStatistics()
        self.valid: Tensor | None = None
        # changed in place, ever: DDP keeps the buffers that it has seen first
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("directions", torch.tensor(q))
        self.register_buffer("variance", torch.empty(0))

    # -- what it costs -------------------------------------------------------------------------------------------------
    def chosen_estimator(self, in_dim: int) -> Literal["cge", "rge"]:
        """The estimator for so many coordinates."""
        if self.estimator == "auto":
            return "cge" if in_dim <= max(8, self.q) else "rge"
        return self.estimator

    def queries_per_sample(self) -> int | None:
        """Answers that one sample costs in training; None as long as nobody knows the number of coordinates."""
        if self.in_dim is None or self.simulator is None:
            return None
        pairs = self.in_dim if self.chosen_estimator(self.in_dim) == "cge" else int(self.directions)
        return 1 + (2 if self.central else 1) * pairs

    def close(self) -> None:
        """End the workers of the simulator; they are started again when they are needed."""
        if self.simulator is not None:
            self.simulator.close()

    def extra_repr(self) -> str:
        """What is asked, and how."""
        name = "direct" if self.simulator is None else self.simulator.name
        return f"{name}, out_dim={self.out_dim}, estimator={self.estimator}, mu={self.mu}, mode={self.mode}"

    # -- forward -------------------------------------------------------------------------------------------------------
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, z: Tensor, *context: Tensor) -> Tensor:
        """Ask the black box.

        Args:
            z: Shape ``(..., d)``.
            context: Known inputs of the black box, or what ``downstream`` needs; see the class.

        """
        if self.direct is not None or (torch.is_grad_enabled() and z.requires_grad):
            return self._ask(z, context)
        answers: Tensor = _Asked.apply(self, z, *context)
        return answers

    def _ask(self, z: Tensor, context: Sequence[Tensor]) -> Tensor:
        half = z.dtype in (torch.float16, torch.bfloat16)
        out = torch.float32 if half and torch.is_autocast_enabled(z.device.type) else z.dtype
        with torch.autocast(z.device.type, enabled=False):
            z = self._domain(z)
            self._check_dim(z)
            if self.simulator is None:
                return self._directly(z, context)
            flat = z.reshape(-1, z.shape[-1])
            rows = [each.detach().reshape(len(flat), *each.shape[z.ndim - 1 :]) for each in context]
            learns = torch.is_grad_enabled() and z.requires_grad
            if learns:
                # workers are started here, not in the thread of a backward pass
                self.simulator.open()
                self.calls += 1
                if self.training and self.scale == "batch":
                    self._observe(flat.detach())
            question = self._question(flat, rows, losses=True)
            values = question.values.to(device=z.device, dtype=out)
            self.valid = question.valid.to(z.device).view(z.shape[:-1])
            if learns:
                values = with_gradient(flat, values, functools.partial(self._gradient, question))
            return values.view(*z.shape[:-1], *values.shape[1:])

    def simulate(self, z: Tensor, *known: Tensor) -> Tensor:
        """Answers ``(..., m)`` whatever the mode, without a gradient; see ``valid``."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            z = self._domain(z)
            self._check_dim(z)
            if self.direct is not None:
                return cast(Callable[[Tensor], Tensor], self.direct)(torch.cat([z, *known], dim=-1))
            rows = [each.reshape(-1, each.shape[-1]) for each in known]
            question = self._question(z.reshape(-1, z.shape[-1]), rows, losses=False)
            self.valid = question.valid.to(z.device).view(z.shape[:-1])
            return question.values.to(z).view(*z.shape[:-1], self.out_dim)

    def _question(self, z: Tensor, context: list[Tensor], losses: bool) -> Question:
        points = z.detach().to(device="cpu", dtype=torch.float64)
        settings = EstimateSettings(
            estimator=self.chosen_estimator(z.shape[-1]),
            mu=self.mu,
            central=self.central,
            directions=int(self.directions),
            unit=self._unit(points),
            bounds=self.bounds,
            rounding=torch.finfo(z.dtype).eps,
            seed=default_seed() if self.seed is None else self.seed,
            call=int(self.calls),
        )
        simulator = cast(Simulator, self.simulator)
        if self.downstream is not None and losses:
            of_answers = functools.partial(_losses, self.downstream, [each.cpu() for each in context])
            return Question(simulator, points, settings, losses=of_answers)
        known = torch.cat(context, dim=1).to(points) if context else None
        return Question(simulator, points, settings, known)

    def _gradient(self, question: Question, cotangents: Tensor) -> Tensor:
        found = question.estimate(cotangents)
        self.statistics.one_sided += found.one_sided
        self.statistics.missing += int(found.missing.sum())
        self.statistics.snr = found.snr
        if self.max_q is not None and found.snr < _NOISY:
            self.directions.fill_(min(2 * question.settings.directions, self.max_q))
        return found.gradient

    def _directly(self, z: Tensor, context: Sequence[Tensor]) -> Tensor:
        asked = z if self.downstream is not None else torch.cat([z, *context], dim=-1)
        answers = cast(Callable[[Tensor], Tensor], self.direct)(asked)
        if answers.shape != (*z.shape[:-1], self.out_dim):
            raise ValueError(
                f"Expected `fn` to answer an input of shape {tuple(z.shape)} with the shape"
                f" {(*z.shape[:-1], self.out_dim)}, but got {tuple(answers.shape)}."
            )
        self.valid = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device)
        return answers if self.downstream is None else self.downstream(answers, *context)

    def _domain(self, z: Tensor) -> Tensor:
        if self.bounds is None:
            return z
        lowest, highest = (bound.to(z) for bound in self.bounds)
        if self.squash:
            # rounding may reach beyond a bound
            squashed = lowest + (highest - lowest) * z.sigmoid()
            return squashed + (squashed.detach().clamp(lowest, highest) - squashed.detach())
        return z

    def _check_dim(self, z: Tensor) -> None:
        size = z.shape[-1] if z.ndim else 0
        if self.in_dim is None and size:
            self.in_dim = size
        if size != self.in_dim or z.ndim < 2:
            raise ValueError(
                f"Expected argument `z` to have the shape (..., {self.in_dim or 'd'}), with a row a sample, but got"
                f" {tuple(z.shape)}."
            )
        if self.estimator == "cge" and size > _COSTLY and not self.calls:
            rank_zero_warn(
                f"BlackBoxLayer: estimator='cge' asks {2 if self.central else 1} x {size} points for every sample of a"
                f" backward pass. estimator='rge' with q={self.q} asks {2 if self.central else 1} x {self.q}."
            )

    @torch.no_grad()
    def _observe(self, z: Tensor) -> None:
        z = z.double()
        sums = torch.stack([torch.full_like(z[:1].sum(dim=0), len(z)), z.sum(dim=0), z.square().sum(dim=0)])
        # every rank takes part, so that all have one scale
        sum_over_ranks_([sums])
        count, total, squares = sums
        if float(count[0]) < 2.0:
            return
        found = ((squares - total.square() / count) / (count - 1.0)).clamp(min=0.0).to(self.variance)
        if not self.variance.numel():
            self.variance.resize_(found.shape).copy_(found)
        else:
            self.variance.lerp_(found, _MOMENTUM)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}variance")
        if isinstance(saved, Tensor):
            self.variance.resize_(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _unit(self, z: Tensor) -> Tensor | None:
        """The unit of each coordinate, for points in float64."""
        if isinstance(self.scale, Tensor):
            return self.scale.to(z)
        if not self.variance.numel():
            return None
        unit = self.variance.to(z).sqrt()
        # a coordinate that does not vary yet: its magnitude, so that a step is more than rounding
        magnitude = z.abs().mean(dim=0)
        flat = unit < 1e-6 * magnitude
        unit = torch.where(flat, magnitude, unit)
        return torch.where(unit > 0.0, unit, 1.0)


class _Asked(torch.autograd.Function):
    """What is asked without a gradient, for ``torch.func.vmap`` as well: all that is mapped over in one question."""

    @staticmethod
    def forward(layer: BlackBoxLayer, z: Tensor, *context: Tensor) -> Tensor:
        return layer._ask(z, context)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: there is no gradient."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], layer: BlackBoxLayer, z: Tensor, *context: Tensor
    ) -> tuple[Tensor, int]:
        mapped = [
            each.expand(info.batch_size, *each.shape) if place is None else each.movedim(place, 0)
            for each, place in zip((z, *context), in_dims[1:], strict=True)
        ]
        return layer(*mapped), 0


def _losses(downstream: Callable[..., Tensor], context: list[Tensor], answers: Tensor, rows: Tensor) -> Tensor:
    losses = downstream(answers, *(each[rows] for each in context))
    if losses.shape != (len(rows),):
        raise ValueError(
            f"Expected `downstream` to give the loss of each sample, of shape ({len(rows)},), but got"
            f" {tuple(losses.shape)}."
        )
    return losses


class _OfTensors:
    """A function of tensors as one of arrays."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn
        self.__qualname__ = getattr(fn, "__qualname__", type(fn).__qualname__)
        self.__module__ = getattr(fn, "__module__", type(fn).__module__)

    def __call__(self, points: Any, *seeds: Any) -> Any:
        with torch.no_grad():
            return self.fn(torch.from_numpy(points), *map(torch.from_numpy, seeds)).numpy()


def _simulator(
    fn: Simulator | Callable[..., Any] | str, out_dim: int, tensors: bool, settings: dict[str, Any]
) -> Simulator:
    if not isinstance(fn, Simulator):
        run = _OfTensors(cast(Callable[[Tensor], Tensor], fn)) if tensors and callable(fn) else fn
        return Simulator(run, out_dim=out_dim, **settings)
    plain = {"cache": 0, "executor": "serial", "workers": 1, "timeout": None, "on_failure": "raise"}
    given = {name: value for name, value in settings.items() if value != plain[name]}
    if given or tensors:
        raise MisconfigurationException(
            f"Expected a Simulator to bring its own settings, but got {given or 'tensors=True'}. Pass them to the"
            " Simulator."
        )
    if fn.out_dim != out_dim:
        raise ValueError(f"Expected argument `out_dim` to be that of the Simulator, {fn.out_dim}, but got {out_dim}.")
    return fn


def _positive(scale: Any) -> Tensor:
    units = torch.as_tensor(0.0 if isinstance(scale, str) else scale, dtype=torch.float64)
    if units.ndim > 1 or not bool((units > 0.0).all()) or not bool(units.isfinite().all()):
        raise ValueError(f"Expected argument `scale` to be 'batch' or positive numbers, but got {scale!r}.")
    return units


def _box(bounds: tuple[Bound, Bound]) -> tuple[Tensor, Tensor]:
    if len(bounds) != 2:
        raise ValueError(f"Expected argument `bounds` to be a pair (lowest, highest), but got {bounds!r}.")
    lowest, highest = (torch.as_tensor(bound, dtype=torch.float64) for bound in bounds)
    if not bool((lowest < highest).all()):
        raise ValueError(f"Expected argument `bounds` to have the lowest below the highest, but got {bounds!r}.")
    return lowest, highest
