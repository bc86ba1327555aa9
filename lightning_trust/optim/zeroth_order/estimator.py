"""What every estimator of a gradient has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle


class GradientEstimator(ABC):
    """Estimates the gradient of a loss from values of it, and adds it to ``.grad`` as a backward pass would."""

    #: steps that runs of the method's paper have at least; None where it has few
    published_steps: ClassVar[int | None] = None

    def estimate(
        self,
        loss: Callable[[], Any],
        parameters: Mapping[str, Tensor] | Sequence[Tensor],
        generator: Generator | None = None,
        module: nn.Module | None = None,
    ) -> Estimate:
        """Add the estimate to the parameters' ``.grad``.

        The weights are what they were, and so is the state of torch's global generator, but for what one call of the
        loss draws.

        Args:
            loss: Evaluates the loss of one batch at the present weights: a scalar. It calls no ``backward``.
            parameters: The parameters.
            generator: Where the directions come from; torch's global generator if None.
            module: The network that the loss evaluates, for estimators that use more of it than its values.

        """
        seed = int(torch.randint(2**62, (), generator=generator))
        return self.add(LossOracle(loss, parameters, module=module, network=module, seed=seed))

    @abstractmethod
    def add(self, oracle: LossOracle, scale: float = 1.0) -> Estimate:
        """Add ``scale`` times the estimate to the ``.grad`` of the oracle's parameters."""

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({values})"


def gradient_of(parameter: Tensor) -> Tensor:
    """The ``.grad`` of a parameter, of zeros where there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
