"""A loss that is asked at many weights, and what an estimate of its gradient cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_trust.core.distributed import mean_over_ranks, rank, sum_over_ranks_, world_size
from lightning_trust.core.weights import substituted

#: What the ranks share: each has data of its own and all queries are asked of all, or all hold the same batch and each
#: asks a part of the queries.
Parallel = Literal["data", "queries"]


@dataclass(frozen=True)
class Estimate:
    """What an estimate found and what it cost.

    Attributes:
        loss: The loss at the weights as they are where it was asked, else the mean of opposite points; a scalar.
        queries: Losses that were asked of this rank.
        equivalent_forwards: What they cost in forward passes of the network: less than ``queries`` where parts of the
            clean pass are used again.
        snr: Squared length of the gradient over the mean squared error of the estimate; see
            :func:`lightning_trust.functional.zeroth_order.signal_to_noise`.
        bytes_sent: Bytes that this rank handed to collective operations.

    """

    loss: Tensor
    queries: int
    equivalent_forwards: float
    snr: float
    bytes_sent: int = 0


class LossOracle:
    """A loss that can be asked again at other weights.

    Args:
        loss: Evaluates the loss of one and the same batch at the present weights: a scalar. It calls no ``backward``.
        parameters: The tensors that the gradient is for, by name or in a row; those that do not require a gradient are
            left out.
        module: The module that holds them, for estimators that compute with other tensors in their place.
        network: The part of it that maps inputs to outputs, for estimators that use parts of a clean pass again.
        masks: By the names of parameters, which entries are asked (True); all of a parameter without one.
        seed: Seed of the directions; equal on all ranks.
        parallel: ``"data"``: every rank has its own batch and asks everything; values are averaged. ``"queries"``: all
            hold the same batch and each asks a share; values are put together.
        restores_random_state: Whether ``loss`` itself draws the same random numbers at every call. Otherwise the state
            of torch's generators is put back before each, so that dropout is the same.
        clean: The loss at the weights as they are, where it was evaluated already.

    Raises:
        ValueError: If nothing is left to be trained, or a mask fits no parameter.
        MisconfigurationException: If the parameters lie on several devices.

    """

    def __init__(
        self,
        loss: Callable[[], Any],
        parameters: Mapping[str, Tensor] | Sequence[Tensor],
        module: nn.Module | None = None,
        network: nn.Module | None = None,
        masks: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        parallel: Parallel = "data",
        restores_random_state: bool = False,
        clean: Tensor | None = None,
    ) -> None:
        if not isinstance(parameters, Mapping):
            parameters = {f"parameters[{place}]": parameter for place, parameter in enumerate(parameters)}
        self.parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not self.parameters:
            raise ValueError("Expected argument `parameters` to hold one that requires a gradient, but got none.")
        devices = {parameter.device for parameter in self.parameters.values()}
        if len(devices) > 1:
            raise MisconfigurationException(
                "A zeroth-order estimate draws its directions on one device, but got parameters on"
                f" {sorted(str(device) for device in devices)}. Move the network to one of them."
            )
        (self.device,) = devices
        self.masks = dict(masks or {})
        for name, mask in self.masks.items():
            if name not in self.parameters or mask.shape != self.parameters[name].shape:
                shape = tuple(self.parameters[name].shape) if name in self.parameters else "no such parameter"
                raise ValueError(
                    f"Expected the mask of '{name}' to have its shape, {shape}, but got {tuple(mask.shape)}."
                )
        self.loss = loss
        self.module = module
        self.network = network
        self.seed = seed
        self.parallel = parallel
        self.clean = clean
        self.queries = 0
        self.bytes_sent = 0
        self._state = None if restores_random_state else _generators(self.device)

    @property
    def dimensions(self) -> int:
        """Number of entries that are asked."""
        sizes = (
            int(self.masks[name].sum()) if name in self.masks else parameter.numel()
            for name, parameter in self.parameters.items()
        )
        return sum(sizes)

    @property
    def splits(self) -> bool:
        """Whether the ranks ask different queries."""
        return self.parallel == "queries" and world_size() > 1

    def of_another_batch(self, loss: Callable[[], Any], seed: int) -> LossOracle:
        """An oracle of the same parameters for another loss."""
        restores = self._state is None
        return LossOracle(loss, self.parameters, self.module, self.network, self.masks, seed, self.parallel, restores)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The loss at the present weights, one query; a detached scalar of at least single precision."""
        self.queries += 1
        return self.scalar(self.value())

    def base(self) -> Tensor:
        """The loss at the weights as they are."""
        return self() if self.clean is None else self.scalar(self.clean)

    def value(self) -> Tensor:
        """What the loss gives at the present weights, with the random numbers of every other call."""
        if self._state is not None:
            _set_generators(self._state)
        return self.loss()

    @staticmethod
    def scalar(loss: Any) -> Tensor:
        """Refuse what is no scalar."""
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            found = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"Expected the loss to be one floating number, but got {found}.")
        loss = loss.detach().reshape(())
        return loss if loss.dtype.itemsize >= 4 else loss.float()

    def check_repeatable(self) -> None:
        """Refuse a loss that differs when it is asked twice at the same weights.

        Raises:
            ValueError: With both values.

        """
        self.check_repeats(self())

    def check_repeats(self, first: Tensor) -> None:
        """Refuse a loss that differs from what it was at the same weights.

        Raises:
            ValueError: With both values.

        """
        second = self()
        if not same_loss(first, second):
            raise ValueError(
                "Expected the loss to be the same when it is evaluated twice at the same weights, but got"
                f" {float(first):.9g} and {float(second):.9g}: a stochastic closure. Freeze its randomness: evaluate"
                " one batch in all calls, and draw from torch's global generators, which are put back, or not at all."
            )

    @torch.no_grad()
    def reads_through(self, module: nn.Module) -> bool:
        """Whether the loss takes its parameters from a module, so that others can be put in their place there."""
        names_in = {id(parameter): name for name, parameter in module.named_parameters()}
        if any(id(parameter) not in names_in for parameter in self.parameters.values()):
            return False
        moved = {
            names_in[id(parameter)]: parameter.detach() + 0.01 * (1 + place % 7)
            for place, parameter in enumerate(self.parameters.values())
        }
        kept = [parameter.detach().clone() for parameter in self.parameters.values()]
        with substituted(module, moved):
            first = self()
        try:
            for place, parameter in enumerate(self.parameters.values()):
                parameter.data.add_(0.01 * (1 + place % 7))
            second = self()
        finally:
            for parameter, value in zip(self.parameters.values(), kept, strict=True):
                parameter.data.copy_(value)
        self.queries -= 2
        return same_loss(first, second)

    # -- ranks ---------------------------------------------------------------------------------------------------------
    def share(self, costs: Tensor | int) -> slice:
        """Which of the queries, in their order, this rank asks: a contiguous part of equal cost.

        Args:
            costs: Cost of each query, or their number where all cost the same.

        """
        count = costs if isinstance(costs, int) else len(costs)
        ranks = world_size()
        if not self.splits:
            return slice(0, count)
        # prefix sums: a query belongs to the rank in whose part of the whole cost its middle lies
        each = torch.ones(count, dtype=torch.float64) if isinstance(costs, int) else costs.double().cpu()
        ends = each.cumsum(0)
        cuts = torch.arange(1, ranks, dtype=torch.float64) * (float(ends[-1]) if count else 0.0) / ranks
        bounds = [0, *torch.searchsorted(ends - each / 2.0, cuts).tolist(), count]
        return slice(bounds[rank()], bounds[rank() + 1])

    def combined(self, values: Tensor, costs: Tensor | int | None = None) -> Tensor:
        """Values of all queries, from those of the ranks.

        Args:
            values: One a query of :meth:`share`.
            costs: What was given to :meth:`share`; the number of values where this rank asked all.

        """
        ranks = world_size()
        if ranks == 1:
            return values
        if self.parallel == "data":
            self.bytes_sent += values.numel() * values.element_size()
            return mean_over_ranks(values)
        costs = len(values) if costs is None else costs
        whole = values.new_zeros(costs if isinstance(costs, int) else len(costs))
        whole[self.share(costs)] = values
        self.bytes_sent += whole.numel() * whole.element_size()
        sum_over_ranks_([whole])
        return whole

    def estimate(self, loss: Tensor, snr: float, equivalent_forwards: float | None = None) -> Estimate:
        """What the queries so far found and cost."""
        forwards = float(self.queries) if equivalent_forwards is None else equivalent_forwards
        return Estimate(loss, self.queries, forwards, snr, self.bytes_sent)


def check_finite(values: Tensor, place: Callable[[int], str]) -> None:
    """Refuse losses that are not finite.

    Args:
        values: Losses, or their differences; equal on all ranks.
        place: Words for where the value of an index was asked.

    Raises:
        ValueError: Naming the first place.

    """
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise ValueError(f"Expected the loss to be finite, but got {float(values[first])} {place(first)}.")


def resolution(loss: Tensor) -> float:
    """How far two losses must differ to be told apart: their size times the machine epsilon of their type."""
    return float(loss.abs()) * torch.finfo(loss.dtype).eps


def check_mu(mu: float) -> None:
    """Refuse a length of a difference that is not positive."""
    if not (mu > 0.0 and math.isfinite(mu)):
        raise ValueError(f"Expected argument `mu` to be a positive number, but got {mu}.")


def check_count(name: str, value: int) -> None:
    """Refuse a number below one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected argument `{name}` to be an integer of at least 1, but got {value!r}.")


def same_loss(first: Tensor, second: Tensor) -> bool:
    """Whether two losses are equal up to the rounding of a few operations; two that are no numbers are."""
    gap = abs(float(first) - float(second))
    return not gap > 16.0 * max(resolution(first), resolution(second))


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
