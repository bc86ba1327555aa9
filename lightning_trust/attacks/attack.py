"""What all attacks share: raw units, modes, precision, randomness, checks."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_trust.attacks.preparation import (
    Model,
    check_counts,
    check_logits,
    check_radius,
    prepared,
)
from lightning_trust.core.randomness import SampleDraws
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.losses import (
    check_classes,
    dlr_loss,
    dlr_loss_targeted,
    kl_divergence,
    margin,
)
from lightning_trust.functional.adversarial.projections import Norm, check_norm

Loss = Callable[[Tensor, Tensor], Tensor]
LossName = Literal["ce", "dlr", "margin", "kl"]
_LEAST_CLASSES = {"ce": 2, "dlr": 3, "margin": 2, "kl": 1}
UNIT_BOX = InputSpace()


@dataclass
class Problem:
    """One batch to be attacked, in raw units: what a subclass of :class:`Attack` works on.

    Attributes:
        model: Raw float32 inputs -> outputs of the network, in float32 at least.
        inputs: Clean raw inputs, float32, shape ``(N, ...)``, in the box.
        targets: True targets, shape ``(N,)``; for a loss of the user's, whatever it takes.
        goal: Classes to be reached, for a targeted attack.
        low: Smallest valid raw input.
        high: Largest valid raw input.
        draws: Random numbers of the samples.
        check: Whether gradients are looked at for NaN.
        watch: Where it is kept whether gradients were finite, as scalars on the device, for a look at a better time.
        places: Which row of the batch each sample is.
        queries: Where forward passes are counted, one number a row of the batch; None where they are not.

    """

    model: Model
    inputs: Tensor
    targets: Tensor
    goal: Tensor | None
    low: float
    high: float
    draws: SampleDraws
    check: bool
    watch: list[Tensor] | None = None
    places: Tensor | None = None
    queries: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, rows: Tensor) -> Problem:
        """The same for some of the samples, by index or by a boolean mask."""
        return replace(
            self,
            inputs=self.inputs[rows],
            targets=self.targets[rows],
            goal=None if self.goal is None else self.goal[rows],
            draws=self.draws.rows(rows),
            places=None if self.places is None else self.places[rows],
        )

    def clip(self, raw: Tensor) -> Tensor:
        """Raw inputs moved to the nearest point of the box."""
        return raw.clamp(self.low, self.high)

    @torch.no_grad()
    def outputs(self, raw: Tensor) -> Tensor:
        """Outputs without a graph; for one point a sample, or as many for each."""
        if self.queries is not None and self.places is not None:
            self.queries[self.places] += len(raw) // max(1, len(self.places))
        return self.model(raw)

    def fooled(self, outputs: Tensor) -> Tensor:
        """Which samples an attack has won, boolean, shape ``(N,)``."""
        predicted = outputs.argmax(dim=1)
        return predicted != self.targets if self.goal is None else predicted == self.goal


class Attack(ABC):
    r"""Base of attacks on inputs: plain objects that are called with a model and a batch.

    ``attack(model, inputs, targets)`` returns adversarial inputs of the same shape, type and device. Budgets are in raw
    units, that is in the units of an :class:`~lightning_trust.core.InputSpace` (by default images in [0, 1]); where the
    data arrive normalised, the space says how, and the attack works on the raw inputs behind them. While it runs, the
    network is in eval mode, its parameters take no gradients, and afterwards modes, flags, BatchNorm statistics and
    ``.grad`` are what they were. It works under ``torch.inference_mode`` and inside autocast: the network computes in
    the precision of the run, perturbation and gradient are float32.

    Args:
        eps: Radius of the norm ball in raw units; None for attacks that look for the smallest perturbation.
        norm: Norm of the ball.
        targeted: Whether the attack is to reach the classes given as ``target`` in the call.
        loss: What is maximised, one value a sample: ``"ce"`` (cross-entropy), ``"dlr"`` (difference of logits ratio),
            ``"margin"`` (largest other logit minus that of the target), ``"kl"`` (divergence from the outputs on the
            clean inputs; targets are not looked at), or a function of outputs and targets with values ``(N,)``.
        batch_norm: ``"eval"``: BatchNorm uses its running statistics. ``"batch"``: it uses those of the batch and
            leaves the running ones alone.
        space: Box and normalisation of the inputs; a callback fills in that of the data module.
        batch_size: The batch is attacked in parts of this size; whole if None.

    Raises:
        ValueError: If an argument is out of its range.

    """

    #: whether a subclass asks for outputs only, and tells in ``queries`` how often
    black_box = False

    def __init__(
        self,
        eps: float | None,
        norm: Norm = "linf",
        targeted: bool = False,
        loss: LossName | Loss = "ce",
        batch_norm: Literal["eval", "batch"] = "eval",
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        check_norm(norm)
        if eps is not None and not (eps >= 0.0 and math.isfinite(eps)):
            raise ValueError(f"Expected argument `eps` to be at least 0 and finite, but got {eps}.")
        if not callable(loss) and loss not in _LEAST_CLASSES:
            raise ValueError(
                f"Expected argument `loss` to be one of {list(_LEAST_CLASSES)} or a function, but got {loss!r}."
            )
        if batch_norm not in ("eval", "batch"):
            raise ValueError(f"Expected argument `batch_norm` to be 'eval' or 'batch', but got {batch_norm!r}.")
        check_counts(batch_size=batch_size)
        self.eps = eps
        self.norm = norm
        self.targeted = targeted
        self.loss = loss
        self.batch_norm = batch_norm
        self.space = space
        self.batch_size = batch_size
        self._queries: list[Tensor] = []
        if space is not None:
            self.check_budget(space)

    @property
    def queries(self) -> Tensor:
        """How often the last call asked the network about each sample: int64, shape ``(N,)``; black-box attacks only.

        Raises:
            AttributeError: If the attack uses gradients, or was not called.

        """
        if not self._queries:
            raise AttributeError(
                f"{type(self).__name__} has counted no queries: only a call of a black-box attack does."
            )
        return torch.cat(self._queries)

    def __repr__(self) -> str:
        said = {name: value for name, value in self.__dict__.items() if not name.startswith("_") and value is not None}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    # -- for subclasses and attacks made of attacks --------------------------------------------------------------------
    def perturb(self, problem: Problem) -> Tensor:
        """Adversarial raw inputs for a batch that :meth:`__call__`, of this attack or one that holds it, prepared."""
        if self.loss == "kl":
            problem = replace(problem, targets=problem.outputs(problem.inputs))
        return self._perturb(problem).detach()

    @abstractmethod
    def _perturb(self, problem: Problem) -> Tensor:
        """Adversarial raw inputs for a batch, in the box; the caller has left inference mode and set modes."""

    def values(self, outputs: Tensor, problem: Problem) -> Tensor:
        """What the attack maximises, shape ``(N,)``."""
        if callable(self.loss):
            values = self.loss(outputs, problem.targets if problem.goal is None else problem.goal)
            if not isinstance(values, Tensor) or values.shape != outputs.shape[:1]:
                found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"Expected argument `loss` to return one value a sample, shape ({len(outputs)},), but got {found}."
                )
            return values if problem.goal is None else -values
        if self.loss == "kl":
            return kl_divergence(outputs, problem.targets)
        check_classes(outputs, _LEAST_CLASSES[self.loss], self.loss)
        if self.loss == "ce":
            goal = problem.targets if problem.goal is None else problem.goal
            cross_entropy = F.cross_entropy(outputs, goal, reduction="none")
            return cross_entropy if problem.goal is None else -cross_entropy
        if self.loss == "dlr":
            if problem.goal is None:
                return dlr_loss(outputs, problem.targets)
            return dlr_loss_targeted(outputs, problem.targets, problem.goal)
        return -margin(outputs, problem.targets) if problem.goal is None else margin(outputs, problem.goal)

    def gradient(self, problem: Problem, raw: Tensor, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the summed values.

        Args:
            problem: The batch.
            raw: Where, shape ``(N, ...)``.
            step: Which step of the attack this is, for the error.

        Returns:
            Gradient, values ``(N,)`` and outputs, without a graph.

        Raises:
            RuntimeError: If the gradient is not finite, naming the step.

        """
        place = raw.detach().requires_grad_()
        outputs = problem.model(place)
        values = self.values(outputs, problem)
        (gradient,) = torch.autograd.grad(values.sum(), place)
        if problem.watch is not None:
            problem.watch.append(torch.isfinite(gradient.sum()))
        if problem.check and not bool(torch.isfinite(gradient).all()):
            raise RuntimeError(
                f"{type(self).__name__} got a gradient with NaN or infinite values in step {step}. Does the network"
                " give finite outputs and losses for these inputs?"
            )
        return gradient, values.detach(), outputs.detach()

    # -- for callers ---------------------------------------------------------------------------------------------------
    def check_budget(self, space: InputSpace) -> None:
        """Refuse a radius that cannot be meant in the units of a space.

        Raises:
            ValueError: If an l-infinity radius is larger than the box.

        """
        if self.eps is not None and self.norm == "linf":
            check_radius(self.eps, space)

    def replaced(self, **arguments: Any) -> Attack:
        """A copy with other values of some arguments.

        Raises:
            ValueError: If the attack has no such argument.

        """
        twin = copy.copy(self)
        for name, value in arguments.items():
            if name not in self.__dict__:
                raise ValueError(f"{type(self).__name__} has no argument `{name}`, which it needs for this use.")
            setattr(twin, name, value)
        return twin

    def __call__(
        self,
        model: Model,
        inputs: Tensor,
        targets: Tensor,
        *,
        target: Tensor | None = None,
        space: InputSpace | None = None,
        draws: SampleDraws | None = None,
        check: bool = True,
        watch: list[Tensor] | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Maps inputs to logits ``(N, K)``; a module, or any function.
            inputs: As the model takes them, floating, shape ``(N, ...)``.
            targets: True classes, int64, shape ``(N,)``.
            target: Classes to be reached, for a targeted attack.
            space: Box and normalisation of the inputs, where the attack was made without; images in [0, 1] if None.
            draws: Random numbers of the samples; from torch's global generator if None.
            check: Whether inputs, targets and gradients are looked at, which on a GPU waits for it. A training loop
        does so in its first batch.
            watch: A list that gets a boolean scalar a gradient: whether it was finite, without waiting for the device.

        Returns:
            Adversarial inputs: shape, type and device of ``inputs``, without a graph.

        Raises:
            ValueError: If inputs or targets are of a wrong kind or out of their range.
            RuntimeError: If a gradient is not finite.

        """
        space = self.space or space or UNIT_BOX
        self.check_budget(space)
        self._check_call(inputs, targets, target)
        self._queries = []
        if self.eps == 0.0:
            if self.black_box:
                self._queries = [torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)]
            return inputs.detach().clone()
        if draws is None:
            draws = SampleDraws(torch.arange(len(inputs), device=inputs.device))
        size = self.batch_size or max(1, len(inputs))
        with torch.inference_mode(False), torch.enable_grad(), prepared(model, self.batch_norm):
            # a clone made here is no inference tensor, whatever the one that came is
            x, y = inputs.detach().clone(), targets.detach().clone()
            goal = None if target is None else target.detach().clone()
            if check:
                self._check_values(space, x, y, goal)
            parts = []
            for start in range(0, len(x), size):
                part = slice(start, start + size)
                rows = torch.arange(len(x), device=x.device)[part]
                parts.append(
                    self._attacked(
                        model,
                        x[part],
                        y[part],
                        None if goal is None else goal[part],
                        space,
                        draws.rows(rows) if size < len(x) else draws,
                        check,
                        watch,
                    )
                )
            return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _attacked(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        goal: Tensor | None,
        space: InputSpace,
        draws: SampleDraws,
        check: bool,
        watch: list[Tensor] | None,
    ) -> Tensor:
        kind = x.dtype
        # the first outputs that the attack asks for are looked at, whatever they are for: no forward pass is spent
        unseen = [True] if check and not callable(self.loss) and self.loss != "kl" else []

        def of_raw(raw: Tensor) -> Tensor:
            outputs = model(space.from_raw(raw).to(kind))
            if unseen:
                unseen.clear()
                check_logits(outputs, y, type(self).__name__)
                if goal is not None:
                    check_logits(outputs, goal, type(self).__name__, "target")
            half = isinstance(outputs, Tensor) and outputs.dtype in (torch.float16, torch.bfloat16)
            return outputs.float() if half else outputs

        wide = torch.promote_types(kind, torch.float32)
        raw = space.to_raw(x.to(wide)).clamp(space.low, space.high)
        problem = Problem(of_raw, raw, y, goal, space.low, space.high, draws, check, watch)
        if self.black_box:
            problem.places = torch.arange(len(x), device=x.device)
            problem.queries = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            self._queries.append(problem.queries)
        perturbed = self.perturb(problem)
        if not space.normalised:
            return perturbed.to(kind)
        # where nothing was added, nothing changes by rounding either
        return torch.where(perturbed == raw, x, space.from_raw(perturbed).to(kind))

    def _check_call(self, inputs: Tensor, targets: Tensor, target: Tensor | None) -> None:
        owner = type(self).__name__
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"Expected argument `inputs` of {owner} to be a floating tensor, but got {found}.")
        if self.targeted and target is None:
            raise ValueError(f"Expected argument `target` for {owner}(targeted=True), but got None.")
        if not self.targeted and target is not None:
            raise ValueError(f"Expected argument `target` only with targeted=True, but {owner} has targeted=False.")
        if callable(self.loss) or self.loss == "kl":
            return
        for name, classes in (("targets", targets), ("target", target)):
            if classes is None:
                continue
            if classes.dtype != torch.int64 or classes.shape != inputs.shape[:1]:
                raise ValueError(
                    f"Expected argument `{name}` of {owner} to be int64 classes of shape ({len(inputs)},), but got"
                    f" {classes.dtype} of shape {tuple(classes.shape)}."
                )

    def _check_values(self, space: InputSpace, x: Tensor, y: Tensor, goal: Tensor | None) -> None:
        if not len(x):
            return
        space.check(x)
        if goal is not None and bool((goal == y).any()):
            raise ValueError("Expected argument `target` to differ from `targets` in every row, but some are equal.")
