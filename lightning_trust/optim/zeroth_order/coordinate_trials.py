"""Steps along single coordinates that are judged by the loss they lead to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from lightning_trust.core.distributed import mean_over_ranks
from lightning_trust.core.randomness import derived_seed
from lightning_trust.functional.zeroth_order import signal_to_noise
from lightning_trust.optim.zeroth_order.cge import CGE
from lightning_trust.optim.zeroth_order.oracle import Estimate, LossOracle, check_finite, resolution

#: One coordinate after the other, or all at once by a vote of each.
Rule = Literal["sign", "batch"]


class CoordinateTrials:
    """Tries a step of either sign on single coordinates.

    Args:
        rule: ``"sign"``: one after the other, each from where those before it led; ``"batch"``: all from the same
            weights, and then moved together.
        stp: Whether a coordinate keeps its value where neither sign lowers the loss; it goes down otherwise.

    """

    def __init__(self, rule: Rule, stp: bool) -> None:
        if rule not in get_args(Rule):
            raise ValueError(f"Expected argument `rule` to be one of {list(get_args(Rule))}, but got {rule!r}.")
        self.rule = rule
        self.stp = stp
        # what a loss was found not to bear is kept from step to step
        self._above, self._below = _Change(), _Change()

    def move(self, oracle: LossOracle, rates: Mapping[str, float]) -> Estimate:
        """Take one step.

        Args:
            oracle: The loss; entries that its masks leave out stay where they are.
            rates: Length of a trial for each parameter's name.

        """
        kept = {name: value.detach().clone() for name, value in oracle.parameters.items()}
        try:
            return (self._move_one_by_one if self.rule == "sign" else self._move_together)(oracle, rates)
        except BaseException:
            # the weights are the user's
            with torch.no_grad():
                for name, value in kept.items():
                    oracle.parameters[name].data.copy_(value)
            raise

    # -- one after the other -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _move_one_by_one(self, oracle: LossOracle, rates: Mapping[str, float]) -> Estimate:
        first = current = _base_for_all(oracle)
        slopes, lost = [], 0.0
        for name, parameter in oracle.parameters.items():
            rate, flat = rates[name], parameter.data
            if rate == 0.0:
                continue
            for place in active_entries(oracle, name).tolist():
                at = torch.unravel_index(torch.tensor(place), flat.shape) if flat.ndim else ()
                old = flat[at].clone()
                words = f"at coordinate {place} of '{name}' (a step of {rate:g})"
                flat[at] = old + rate
                trial = _loss_for_all(oracle, words)
                slopes.append(float(trial - current) / rate)
                lost += 2.0 * (resolution(first) / rate) ** 2
                if not bool(trial < current):
                    flat[at] = old - rate
                    trial = _loss_for_all(oracle, words)
                    if self.stp and not bool(trial < current):
                        # the value itself: what was added and taken away again may be rounded
                        flat[at] = old
                        continue
                current = trial
        square = sum(slope**2 for slope in slopes)
        return oracle.estimate(first, signal_to_noise(square, lost, 0.0, lost))

    # -- all together --------------------------------------------------------------------------------------------------
    def _move_together(self, oracle: LossOracle, rates: Mapping[str, float]) -> Estimate:
        first = _base_for_all(oracle)
        every = oracle.parameters
        squares: list[tuple[float, float]] = []
        forwards = float(oracle.queries)
        moves: dict[str, Tensor] = {}
        try:
            # a length of a difference for each estimate
            for rate in dict.fromkeys(rates[name] for name in every if rates[name] > 0.0):
                oracle.parameters = {name: value for name, value in every.items() if rates[name] == rate}
                above, estimate, cost = self._above.of(oracle, rate)
                forwards += cost
                below: dict[str, Tensor] = {}
                if self.stp:
                    below, _, cost = self._below.of(oracle, -rate)
                    forwards += cost
                for name, change in above.items():
                    down = below[name] < 0.0 if self.stp else torch.ones_like(change, dtype=torch.bool)
                    mask = oracle.masks.get(name)
                    asked = torch.ones_like(down) if mask is None else mask.to(down.device)
                    sign = torch.where(change < 0.0, 1.0, torch.where(down, -1.0, 0.0))
                    moves[name] = rate * torch.where(asked, sign, 0.0).to(change.dtype)
                squares.append((sum(float(change.square().sum()) for change in above.values()) / rate**2, estimate.snr))
        finally:
            oracle.parameters = every
        with torch.no_grad():
            for name, move in moves.items():
                every[name].data.add_(move)
        square = sum(part for part, _ in squares)
        noise = sum(part / snr for part, snr in squares if snr > 0.0)
        return oracle.estimate(first, square / noise if noise > 0.0 else 0.0, forwards)


class _Change(CGE):
    """Change of the loss by a step of either sign along single coordinates."""

    def __init__(self) -> None:
        super().__init__(mu=1.0)

    def of(self, oracle: LossOracle, by: float) -> tuple[dict[str, Tensor], Estimate, float]:
        """Changes by names of parameters, what they say of the gradient, and what they cost in forward passes."""
        self.mu = by
        asked, oracle.queries = oracle.queries, 0
        gradients = {name: parameter.grad for name, parameter in oracle.parameters.items()}
        try:
            for parameter in oracle.parameters.values():
                parameter.grad = None
            # a difference that is multiplied by its length is the change itself but for rounding, and keeps its sign
            estimate = self.add(oracle, by)
            changes = {name: value.grad for name, value in oracle.parameters.items() if value.grad is not None}
        finally:
            oracle.queries += asked
            for name, parameter in oracle.parameters.items():
                parameter.grad = gradients[name]
        return changes, estimate, estimate.equivalent_forwards


def drop_coordinates(oracle: LossOracle, dropout: float) -> None:
    """Leave entries out of an oracle's masks, each with probability ``dropout``; the same ones on all ranks.

    Args:
        oracle: The loss, whose seed says which.
        dropout: The probability.

    """
    if dropout == 0.0:
        return
    for place, (name, parameter) in enumerate(oracle.parameters.items()):
        # on the CPU, so that a run on another device leaves out the same
        generator = Generator().manual_seed(derived_seed(oracle.seed, "coordinates", place))
        kept = (torch.rand(parameter.shape, generator=generator) >= dropout).to(parameter.device)
        mask = oracle.masks.get(name)
        oracle.masks[name] = kept if mask is None else kept & mask.to(kept.device)


def active_entries(oracle: LossOracle, name: str) -> Tensor:
    """Flat indices of the entries of a parameter that are asked, int64."""
    mask = oracle.masks.get(name)
    if mask is None:
        return torch.arange(oracle.parameters[name].numel())
    return mask.flatten().nonzero().flatten()


def _base_for_all(oracle: LossOracle) -> Tensor:
    return _of_all_ranks(oracle, oracle.base(), "at the weights as they are")


def _loss_for_all(oracle: LossOracle, words: str) -> Tensor:
    return _of_all_ranks(oracle, oracle(), words)


def _of_all_ranks(oracle: LossOracle, value: Tensor, words: str) -> Tensor:
    """A loss at the present weights as one number for all ranks: what is decided by it is decided alike."""
    if not oracle.splits:
        value = oracle.combined(value.reshape(1))[0]
    else:
        # all hold the same batch, and a trial follows on the one before it: each rank asks every one
        oracle.bytes_sent += value.element_size()
        value = mean_over_ranks(value)
    check_finite(value.reshape(1), lambda _: words)
    return value
