"""Losses at many coordinates in one pass, from the inputs of the blocks that a clean pass left.

Three levers multiply. Many coordinates are evaluated at a time, stacked along the samples. What comes before the block
of a coordinate is not computed again. And one coordinate of a convolution or linear layer changes one channel of its
output: until the next such layer only that channel is computed, and that layer adds the increment of one channel to
what it gave in the clean pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_trust.core.blocks import split
from lightning_trust.core.modes import unused_running_statistics
from lightning_trust.optim.zeroth_order.block_passes import (
    CHANNELWISE,
    ELEMENTWISE,
    SAMPLEWISE,
    BlockPasses,
    Channels,
    CleanCall,
)
from lightning_trust.optim.zeroth_order.cross_entropy import CrossEntropyCalls, NearbyCrossEntropy, SamplesLast
from lightning_trust.optim.zeroth_order.oracle import LossOracle, same_loss

#: bytes of activations that are worked on at a time on a processor
_CACHE = 1 << 21


class BlockQueries:
    """Asks a loss at single coordinates of a network that is a chain of blocks.

    Args:
        oracle: The loss, its parameters and the network.
        blocks: Modules whose composition is the network.
        memory: About how many bytes the coordinates that are evaluated at a time may take.
        vectorized: Whether losses are taken of many outputs at once; turned off where the loss cannot.

    Attributes:
        base: The loss at the weights as they are.
        evaluations: Blocks that were evaluated for coordinates, each counted as often as coordinates ran through it.
        outside: Coordinates of parameters that are in no block, which cost a whole pass each.
    """

    def __init__(self, oracle: LossOracle, blocks: Sequence[nn.Module], memory: int, vectorized: bool = True) -> None:
        self.oracle = oracle
        self.network = oracle.network
        self.blocks = blocks
        self.memory = memory
        self.passes = BlockPasses(blocks, memory)
        self.evaluations = 0
        self.outside = 0
        self.vectorized = vectorized
        self._cross_entropy: NearbyCrossEntropy | None = None
        inside = {id(parameter): place for place, block in enumerate(blocks) for parameter in block.parameters()}
        self.block_of = {
            name: inside[id(parameter)] for name, parameter in oracle.parameters.items() if id(parameter) in inside
        }
        self._calls = self._clean_pass()

    @staticmethod
    def of(oracle: LossOracle, memory: int, vectorized: bool = True) -> BlockQueries | None:
        """The queries of an oracle whose network is a chain of blocks that its loss runs through, or None."""
        network = oracle.network
        blocks = None if network is None else split(network)
        if blocks is None or any(_hooked(module) for module in network.modules()):  # type: ignore[union-attr]
            return None
        if any(block.training and _random(block) for block in blocks):
            return None
        queries = BlockQueries(oracle, blocks, memory, vectorized)
        if not queries._calls or queries._calls_follow() or queries._loss_reads_weights():
            return None
        # what is subtracted from all others is rounded as they are
        if queries._cross_entropy is not None:
            queries.base = queries._cross_entropy.base
        else:
            queries.base = queries._losses_of([output[None] for output in queries._outputs])[0]
            oracle.queries -= 1
        return queries

    # -- the clean pass ------------------------------------------------------------------------------------------------
    def _clean_pass(self) -> list[CleanCall]:
        calls: list[CleanCall] = []

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                raise _NotAChainError
            # differences are of the precision of the weights, whatever the run's is
            with torch.autocast(args[0].device.type, enabled=False):
                calls.append(CleanCall(self.blocks, args[0]))
            return calls[-1].inputs[-1]

        try:
            with torch.no_grad(), unused_running_statistics(self._network), _replaced_forward(self._network, forward):
                self.base = self.oracle()
        except _NotAChainError:
            return []
        return calls

    @torch.no_grad()
    def _calls_follow(self) -> bool:
        """Whether what the network is given depends on what it gave before, as in a recurrence or a rollout.

        Then a coordinate changes more than the outputs of the inputs that the clean pass left.
        """
        if len(self._calls) == 1:
            return False
        given: list[Tensor] = []
        try:
            self._loss_of(*(x + 1e-3 * (1.0 + x.abs()) for x in self._outputs), given=given)
        except Exception:
            # whatever a loss makes of other outputs, it is asked whole then
            return True
        clean = [call.inputs[0] for call in self._calls]
        return len(given) < len(clean) or any(not torch.equal(*pair) for pair in zip(given, clean, strict=True))

    @torch.no_grad()
    def _loss_reads_weights(self) -> bool:
        """Whether the loss depends on weights otherwise than through the network's outputs, as a penalty does.

        On the way it is seen whether the loss is the mean cross-entropy of one output and nothing else: then it needs
        no evaluation of the whole step for every coordinate.
        """
        outputs, watch = self._outputs, CrossEntropyCalls()
        inside = [self.oracle.parameters[name] for name in self.block_of]
        kept = [parameter.detach().clone() for parameter in inside]
        try:
            for parameter in inside:
                parameter.data.add_(1.0)
            with watch:
                found = self._loss_of(*outputs)
        finally:
            for parameter, value in zip(inside, kept, strict=True):
                parameter.data.copy_(value)
        targets = watch.targets_of(outputs[0], found) if len(outputs) == 1 else None
        if targets is not None:
            self._cross_entropy = NearbyCrossEntropy(outputs[0], targets)
        return not same_loss(self.oracle.scalar(found), self.base)

    @property
    def _outputs(self) -> list[Tensor]:
        """What the network's calls gave in the clean pass."""
        return [call.inputs[-1] for call in self._calls]

    @property
    def _network(self) -> nn.Module:
        assert self.network is not None  # noqa: S101  (`of` sees to it)
        return self.network

    # -- queries -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def losses(self, name: str, places: Tensor, by: float) -> Tensor:
        """Losses with single entries of a parameter moved.

        Args:
            name: Name of the parameter.
            places: Flat indices of the entries, int64, ascending.
            by: How far each is moved.

        Returns:
            One loss an entry.

        """
        found: list[Tensor] = []
        block = self.block_of[name]
        if not len(places):
            return self.base.new_zeros(0)
        with unused_running_statistics(self._network):
            for some in places.split(self._chunk(name)):
                states = [self._before_last(call, name, block, some, by) for call in self._calls]
                found.append(self._losses_after(states))
                self.evaluations += len(some) * (len(self.blocks) - block) * len(self._calls)
        return torch.cat(found)

    def costs(self, name: str) -> float:
        """About the time that a coordinate of a parameter takes, in passes over one number."""
        return sum(self._cost(call, self.block_of[name]) for call in self._calls)

    def _cost(self, call: CleanCall, first: int) -> float:
        """Measured weights, of writing a number: 4 for a pool or the loss, 6 for a normalisation, products less."""
        block, out = self.blocks[first], call.inputs[first + 1]
        narrow = isinstance(block, (nn.Linear, nn.Conv2d, _BatchNorm)) and out.ndim > 1
        # how many of its channels a block computes: one, and after the next layer all
        part = 1.0 / out.shape[1] if narrow else 1.0
        total = 4.0 * out.numel() * part
        if not narrow:
            total += 0.1 * out.numel() * _fan_in(block)
        last = len(self.blocks) - 1
        stays = self._stays_narrow(first)
        if stays and first == last:
            return total + 8.0 * len(out)
        for place in range(first + 1, last + 1):
            block, x, out = self.blocks[place], call.inputs[place], call.inputs[place + 1]
            if isinstance(block, (*SAMPLEWISE, _BatchNorm, _DropoutNd)) and not isinstance(
                block, (nn.Linear, nn.Conv2d)
            ):
                passes = 4.0 if isinstance(block, CHANNELWISE) else 6.0 if isinstance(block, _BatchNorm) else 1.0
                total += passes * x.numel() * part
            else:
                # products over few channels are slow ones
                each = 0.4 if part < 1.0 else 0.1
                total += out.numel() * (1.0 + each * _fan_in(block) * part)
                part = 1.0
        # a linear layer that turns one channel into losses writes exponentials, which are counted, and nothing else
        return total + (0.0 if stays else 4.0 * call.inputs[-1].numel())

    def _chunk(self, name: str) -> int:
        block = self.block_of[name]
        largest = max(x.numel() * x.element_size() for call in self._calls for x in call.inputs[block + 1 :])
        own = self.oracle.parameters[name]
        if not isinstance(self.blocks[block], (nn.Linear, nn.Conv2d, _BatchNorm)):
            largest += own.numel() * own.element_size()
        # the input and the output of a layer, and what it works in
        chunk = self.memory // (3 * largest)
        if self.base.device.type == "cpu":
            # what stays in a cache is read and written several times as fast
            if self._stays_narrow(block):
                call = self._calls[0]
                largest = max(x.nbytes // x.shape[1] for x in call.inputs[block + 1 : max(block + 2, len(self.blocks))])
                chunk = min(chunk, max(16, _CACHE // (4 * largest)))
            else:
                chunk = min(chunk, max(2, _CACHE // largest))
        return max(1, chunk)

    def _stays_narrow(self, first: int) -> bool:
        """Whether only one channel of a coordinate is computed until a last linear layer turns it into a loss."""
        blocks = self.blocks
        if self._cross_entropy is None or type(blocks[-1]) is not nn.Linear or self._calls[0].inputs[-1].ndim != 2:
            return False
        between = (*ELEMENTWISE, *CHANNELWISE, _BatchNorm, nn.Flatten, _DropoutNd)
        return isinstance(blocks[first], (nn.Linear, nn.Conv2d, _BatchNorm)) and all(
            isinstance(block, between) for block in blocks[first + 1 : -1]
        )

    def _before_last(self, call: CleanCall, name: str, first: int, places: Tensor, by: float) -> tuple[Any, bool]:
        """What the last block is given, or its output if the coordinate is in it, and whether it is yet to be run."""
        state: Tensor | Channels = self.passes.moved(call, self.oracle.parameters[name], first, places, by)
        last = len(self.blocks) - 1
        for place in range(first + 1, last):
            state = self.passes.through(call, place, state)
        return state, first < last

    def _losses_after(self, states: list[tuple[Any, bool]]) -> Tensor:
        state, unfinished = states[0]
        if self._cross_entropy is not None and isinstance(state, Channels):
            found = self._cross_entropies(self._cross_entropy, state, unfinished)
            if found is not None:
                self.oracle.queries += len(found)
                return found if found.dtype.itemsize >= 4 else found.float()
        last = len(self.blocks) - 1
        outputs = [
            self.passes.whole(call, last + 1, self.passes.through(call, last, state) if unfinished else state)
            for call, (state, unfinished) in zip(self._calls, states, strict=True)
        ]
        return self._losses_of(outputs)

    # -- the loss ------------------------------------------------------------------------------------------------------
    def _losses_of(self, outputs: list[Tensor]) -> Tensor:
        """The losses that the outputs of the network's calls lead to."""
        count = len(outputs[0])
        self.oracle.queries += count
        if self._cross_entropy is not None:
            found = self._cross_entropy.of_logits(outputs[0])
            return found if found.dtype.itemsize >= 4 else found.float()
        if self.vectorized:
            try:
                with SamplesLast():
                    found = torch.func.vmap(self._loss_of, randomness="same")(*outputs)
                return self._scalars(found, count)
            except (RuntimeError, TypeError, ValueError):
                # a step that asks for the value of a tensor, or writes to one, cannot be vectorised; one that is wrong
                # says so below
                self.vectorized = False
        return torch.stack([self.oracle.scalar(self._loss_of(*(each[k] for each in outputs))) for k in range(count)])

    def _cross_entropies(self, loss: NearbyCrossEntropy, state: Channels, unfinished: bool) -> Tensor | None:
        """Losses after one channel a coordinate, or None where the last block is not a linear layer."""
        call, last = self._calls[0], len(self.blocks) - 1
        if type(self.blocks[last]) is not nn.Linear or call.inputs[-1].ndim != 2:
            return None
        if unfinished:
            return loss.of_products(*self.passes.factors(call, last, state))
        return loss.of_one_logit(state.channel, state.values - call.channels(last + 1, state.channel, ()))

    def _scalars(self, found: Any, count: int) -> Tensor:
        if not isinstance(found, Tensor) or found.numel() != count or not found.is_floating_point():
            self.oracle.scalar(found[0] if isinstance(found, Tensor) else found)
        found = found.reshape(count)
        return found if found.dtype.itemsize >= 4 else found.float()

    def _loss_of(self, *outputs: Tensor, given: list[Tensor] | None = None) -> Tensor:
        """The loss where the network answers with these outputs; what it was given is appended to ``given``."""
        calls = iter(zip(outputs, self._calls, strict=True))

        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            if given is not None:
                given.append(x)
            output, call = next(calls)
            torch.set_rng_state(call.state)
            return output

        with _replaced_forward(self._network, forward):
            return self.oracle.value()


class _NotAChainError(Exception):
    """The network is not called with one tensor."""


@contextmanager
def _replaced_forward(network: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let a network answer with something else."""
    own = network.__dict__.get("forward")
    object.__setattr__(network, "forward", forward)
    try:
        yield
    finally:
        if own is None:
            network.__dict__.pop("forward", None)
        else:
            object.__setattr__(network, "forward", own)


def _fan_in(block: nn.Module) -> float:
    """Multiplications for a number of a block's output, summed over its layers."""
    return float(sum(parameter[0].numel() for parameter in block.parameters() if parameter.ndim > 1))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _random(block: nn.Module) -> bool:
    """Whether a block that is no plain dropout draws random numbers, as far as its layers tell."""
    if isinstance(block, _DropoutNd):
        return type(block).__name__ not in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d")
    words = ("Dropout", "DropPath", "StochasticDepth", "DropBlock", "RReLU")
    return any(word in type(module).__name__ for module in block.modules() for word in words)
