"""Optimizers that evaluate a closure rather than take a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_trust.core.randomness import default_seed, derived_seed
from lightning_trust.optim.zeroth_order.estimator import GradientEstimator
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle

#: Makes the oracle of one step from its closure and seed; None where there is no loss.
MakeOracle = Callable[[Callable[[], Any], int], LossOracle | None]
#: Called with a number of batches, or None for all: one loss a batch.
LossesOfBatches = Callable[[int | None], Iterable[Callable[[], Any]]]


class ZerothOrderOptimizer(Optimizer):
    """Base of optimizers that ask for losses: ``step(closure)``, where the closure calls no ``backward``.

    The closure returns the loss of one batch at the present weights; it is evaluated several times a step, each time
    with the same random numbers from torch's global generators, and without a graph. In a Trainer the callback
    ``ZerothOrderGradient`` sees to all of that.

    A subclass overrides :meth:`move`.

    Args:
        params: Parameters, named parameters, or parameter groups.
        defaults: Settings of a group.
        module: The network, for estimators that use more of it than its losses.
        seed: Seed of the directions, which are drawn anew in every step from it and the number of the step; the one of
            ``seed_everything`` if None.

    """

    #: steps that runs of the method's paper have at least; None where it has few
    published_steps: ClassVar[int | None] = None

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], module: nn.Module | None = None, seed: int | None = None
    ) -> None:
        super().__init__(params, {**defaults, "zo_step": 0})
        self.module = module
        self.seed = default_seed() if seed is None else seed
        self._oracle: MakeOracle | None = None
        #: what the last step found and cost
        self.last: Estimate | None = None
        self._checked = False

    def __getstate__(self) -> dict[str, Any]:
        # the network and the run are no state of an optimizer
        return {**super().__getstate__(), "module": None, "_oracle": None}

    @property
    def steps_taken(self) -> int:
        """Number of steps so far; it is kept in the state dict."""
        return int(self.param_groups[0]["zo_step"])

    def named(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name where they came with one."""
        found: dict[str, Tensor] = {}
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"group {number}, parameter {k}" for k in range(len(group["params"]))]
            found.update(zip(names, group["params"], strict=True))
        return {name: parameter for name, parameter in found.items() if parameter.requires_grad}

    def asks_through(self, make: MakeOracle | None) -> None:
        """Ask another oracle than one made of the closure: how a callback brings replays, ranks and masks."""
        self._oracle = make

    # -- what a run tells; most optimizers have no use for it ---------------------------------------------------------
    def begin_epoch(self, epoch: int) -> None:
        """Tell which epoch begins, from 0."""

    def look_at(self, metrics: Mapping[str, Any]) -> None:
        """Tell what a validation logged, by name; equal on all ranks."""

    def draws_batches(self, losses: LossesOfBatches | None) -> None:
        """Tell how to ask the losses of other batches of the training data."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights.

        Args:
            closure: Evaluates the loss of one batch at the present weights; the same batch at every call.

        Returns:
            The loss.

        Raises:
            ValueError: If there is no closure, or its loss is no finite scalar, or differs at equal weights.

        """
        if closure is None:
            raise ValueError(
                f"Expected argument `closure` of {type(self).__name__}.step to evaluate the loss, but got None."
            )
        seed = derived_seed(self.seed, "step", self.steps_taken)
        if self._oracle is not None:
            made = self._oracle(closure, seed)
            if made is None:
                # a batch that the host skips
                return None
            oracle = made
        else:
            oracle = LossOracle(closure, self.named(), module=self.module, network=self.module, seed=seed)
            if not self._checked:
                oracle.check_repeatable()
                oracle.queries = 0
                self._checked = True
        self.last = self.move(oracle)
        for group in self.param_groups:
            group["zo_step"] += 1
        return self.last.loss

    def move(self, oracle: LossOracle) -> Estimate:
        """Take one step."""
        raise NotImplementedError


class EstimatingOptimizer(ZerothOrderOptimizer):
    """Base of optimizers that write an estimate to ``.grad`` and let an optimizer of torch take the step.

    Args:
        base: Makes that optimizer of the parameter groups.
        params: Parameters, named parameters, or parameter groups.
        defaults: Settings of a group, those of ``base`` included.
        estimator: Estimates the gradient.
        module: The network, for estimators that use more of it than its losses.
        seed: Seed of the directions; the one of ``seed_everything`` if None.

    """

    def __init__(
        self,
        base: Callable[[Any], Optimizer],
        params: ParamsT,
        defaults: dict[str, Any],
        estimator: GradientEstimator,
        module: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, defaults, module, seed)
        self.estimator = estimator
        self._base = base(self.param_groups)

    def move(self, oracle: LossOracle) -> Estimate:
        """Estimate the gradient, and step."""
        self.zero_grad(set_to_none=False)
        estimate = self.write_gradient(oracle)
        self.take_step()
        return estimate

    def write_gradient(self, oracle: LossOracle) -> Estimate:
        """Add to ``.grad``, which is zero, what the step is taken along."""
        return self.estimator.add(oracle)

    def take_step(self) -> None:
        """Let torch's optimizer step from ``.grad``."""
        # loading a state dict makes new groups and states
        self._base.param_groups, self._base.state = self.param_groups, self.state
        self._base.step()
