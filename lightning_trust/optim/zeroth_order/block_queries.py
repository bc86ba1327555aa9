"""Losses at many coordinates in one pass, from the inputs of the blocks that a clean pass left.

Three levers multiply. Many coordinates are evaluated at a time, stacked along the samples. What comes before the block
of a coordinate is not computed again. And one coordinate of a convolution or linear layer changes one channel of its
output: until the next such layer only that channel is computed, and that layer adds the increment of one channel to
what it gave in the clean pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_trust.core.blocks import split
from lightning_trust.core.modes import unused_running_statistics
from lightning_trust.core.weights import substituted
from lightning_trust.optim.zeroth_order.cross_entropy import CrossEntropyCalls, NearbyCrossEntropy, SamplesLast
from lightning_trust.optim.zeroth_order.oracle import LossOracle, same_loss

#: layers that work on each entry by itself
_ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.LogSigmoid,
    nn.Tanhshrink,
    nn.Identity,
)
#: bytes of activations that are worked on at a time on a processor
_CACHE = 1 << 21
#: layers that work on each channel of an image by itself
_CHANNELWISE = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
#: layers that work on each sample by itself, so that many batches can be laid one behind the other
_SAMPLEWISE = (*_ELEMENTWISE, *_CHANNELWISE, nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.Flatten)


@dataclass
class _Channels:
    """For each coordinate one channel: ``values[k]``, shape ``(B, ...)``, in the place of the clean ``channel[k]``."""

    values: Tensor
    channel: Tensor


class _Call:
    """What one call of the network left: inputs of its blocks, its output, and the masks of its dropout."""

    def __init__(self, blocks: Sequence[nn.Module], x: Tensor) -> None:
        self.inputs = [x]
        self.masks: dict[int, Tensor] = {}
        for place, block in enumerate(blocks):
            if isinstance(block, _DropoutNd) and block.training and block.p > 0.0:
                # the same numbers that the layer would have drawn
                self.masks[place] = type(block)(block.p)(torch.ones_like(x))
                x = x * self.masks[place]
            else:
                x = block(x.clone() if _in_place(block) else x)
            self.inputs.append(x)
        # what is drawn after the network is drawn from here
        self.state = torch.get_rng_state()
        self._channels: dict[tuple[int, int], Tensor] = {}
        self._unfolded = (-1, x[:0])

    def channels(self, place: int, channel: Tensor, shape: Sequence[int]) -> Tensor:
        """Channels of the input of a block, one a coordinate, ``(K, B, *shape)``."""
        entries = math.prod(shape)
        if (place, entries) not in self._channels:
            # laid out so that picking some copies whole rows
            self._channels[place, entries] = _channels_first(self.inputs[place], entries).contiguous()
        picked = self._channels[place, entries][channel]
        return picked.view(*picked.shape[:2], *shape)

    def patches(self, place: int, block: nn.Conv2d, rows: Tensor, memory: int) -> Tensor:
        """Rows of the unfolded input of a convolution, shape ``(R, B, H' * W')``."""
        if self._unfolded[0] != place:
            x = self.inputs[place]
            columns = F.unfold(x, block.kernel_size, block.dilation, block.padding, block.stride)  # type: ignore[arg-type]
            columns = columns.transpose(0, 1)
            if columns.numel() * columns.element_size() > memory:
                return columns[rows]
            # the one before it is let go: coordinates are asked layer by layer
            self._unfolded = (place, columns.contiguous())
        return self._unfolded[1][rows]

    def masks_of(self, place: int, channel: Tensor, shape: Sequence[int]) -> Tensor:
        """The same of the mask of a block that drops entries."""
        picked = _channels_first(self.masks[place], math.prod(shape))[channel]
        return picked.view(*picked.shape[:2], *shape)


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
        if not queries._calls or queries._loss_reads_weights():
            return None
        # what is subtracted from all others is rounded as they are
        if queries._cross_entropy is not None:
            queries.base = queries._cross_entropy.base
        else:
            queries.base = queries._losses_of([call.inputs[-1][None] for call in queries._calls])[0]
            oracle.queries -= 1
        return queries

    # -- the clean pass ------------------------------------------------------------------------------------------------
    def _clean_pass(self) -> list[_Call]:
        calls: list[_Call] = []

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                raise _NotAChainError
            # differences are of the precision of the weights, whatever the run's is
            with torch.autocast(args[0].device.type, enabled=False):
                calls.append(_Call(self.blocks, args[0]))
            return calls[-1].inputs[-1]

        try:
            with torch.no_grad(), unused_running_statistics(self._network), _replaced_forward(self._network, forward):
                self.base = self.oracle()
        except _NotAChainError:
            return []
        return calls

    @torch.no_grad()
    def _loss_reads_weights(self) -> bool:
        """Whether the loss depends on weights otherwise than through the network's outputs, as a penalty does.

        On the way it is seen whether the loss is the mean cross-entropy of one output and nothing else: then it needs
        no evaluation of the whole step for every coordinate.
        """
        outputs, watch = [call.inputs[-1] for call in self._calls], CrossEntropyCalls()
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

    def _cost(self, call: _Call, first: int) -> float:
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
            if isinstance(block, (*_SAMPLEWISE, _BatchNorm, _DropoutNd)) and not isinstance(
                block, (nn.Linear, nn.Conv2d)
            ):
                passes = 4.0 if isinstance(block, _CHANNELWISE) else 6.0 if isinstance(block, _BatchNorm) else 1.0
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
        between = (*_ELEMENTWISE, *_CHANNELWISE, _BatchNorm, nn.Flatten, _DropoutNd)
        return isinstance(blocks[first], (nn.Linear, nn.Conv2d, _BatchNorm)) and all(
            isinstance(block, between) for block in blocks[first + 1 : -1]
        )

    def _before_last(self, call: _Call, name: str, first: int, places: Tensor, by: float) -> tuple[Any, bool]:
        """What the last block is given, or its output if the coordinate is in it, and whether it is yet to be run."""
        state: Tensor | _Channels = self._moved(call, name, first, places, by)
        last = len(self.blocks) - 1
        for place in range(first + 1, last):
            state = self._through(call, place, state)
        return state, first < last

    def _losses_after(self, states: list[tuple[Any, bool]]) -> Tensor:
        state, unfinished = states[0]
        if self._cross_entropy is not None and isinstance(state, _Channels):
            found = self._cross_entropies(self._cross_entropy, state, unfinished)
            if found is not None:
                self.oracle.queries += len(found)
                return found if found.dtype.itemsize >= 4 else found.float()
        last = len(self.blocks) - 1
        outputs = [
            self._whole(call, last + 1, self._through(call, last, state) if unfinished else state)
            for call, (state, unfinished) in zip(self._calls, states, strict=True)
        ]
        return self._losses_of(outputs)

    # -- the block of the coordinate -----------------------------------------------------------------------------------
    def _moved(self, call: _Call, name: str, place: int, places: Tensor, by: float) -> Tensor | _Channels:
        block, x, out = self.blocks[place], call.inputs[place], call.inputs[place + 1]
        parameter = self.oracle.parameters[name]
        bias = getattr(block, "bias", None)
        inner = parameter[0].numel() if parameter.ndim else 1
        channel, within = places // max(inner, 1), places % max(inner, 1)
        if type(block) is nn.Linear and x.ndim == 2:
            before = call.channels(place + 1, channel, ())
            change = by if parameter is bias else by * call.channels(place, within, ())
            return _Channels(before.add_(change), channel)
        if type(block) is nn.Conv2d and block.padding_mode == "zeros" and not isinstance(block.padding, str):
            before = call.channels(place + 1, channel, out.shape[2:])
            if parameter is bias:
                return _Channels(before + by, channel)
            groups = block.groups
            # a row of the unfolded input for each entry of a filter; filters of a group see the group's channels
            rows = (channel // (block.out_channels // groups)) * inner + within
            patches = call.patches(place, block, rows, self.memory // 3)
            return _Channels(before.add_(patches.view_as(before), alpha=by), channel)
        if isinstance(block, _BatchNorm) and x.ndim in (2, 4):
            before = call.channels(place + 1, places, out.shape[2:])
            if parameter is bias:
                return _Channels(before + by, places)
            values = call.channels(place, places, x.shape[2:])
            return _Channels(before + by * _standardised(block, values, places), places)
        return self._any_block(block, x, parameter, places, by)

    @staticmethod
    def _any_block(block: nn.Module, x: Tensor, parameter: Tensor, places: Tensor, by: float) -> Tensor:
        name = next(own for own, value in block.named_parameters() if value is parameter)
        moved = parameter.detach().reshape(1, -1).repeat(len(places), 1)
        moved.scatter_add_(1, places[:, None], torch.full_like(moved[:, :1], by))

        values = moved.view(-1, *parameter.shape)

        def output(value: Tensor, inputs: Tensor) -> Tensor:
            with substituted(block, {name: value}):
                return block(inputs.clone() if _in_place(block) else inputs)

        try:
            return torch.func.vmap(output, in_dims=(0, None))(values, x)
        except RuntimeError:
            # what the weight does not reach is written to in place: all of the block is computed for each coordinate
            return torch.func.vmap(output)(values, x.expand(len(places), *x.shape))

    # -- the blocks after it -------------------------------------------------------------------------------------------
    def _through(self, call: _Call, place: int, state: Tensor | _Channels) -> Tensor | _Channels:
        block = self.blocks[place]
        if isinstance(state, _Channels):
            narrow = self._narrow(call, place, state)
            if narrow is not None:
                return narrow
            state = self._whole(call, place, state)
        if place in call.masks:
            return state * call.masks[place]
        if isinstance(block, _BatchNorm) and state.ndim in (3, 5):
            return _normalised(block, state, None)
        if type(block) in _SAMPLEWISE and not (isinstance(block, nn.Flatten) and block.start_dim != 1):
            out = block(state.flatten(0, 1))
            return out.view(*state.shape[:2], *out.shape[1:])
        if isinstance(block, _DropoutNd):
            return state
        return torch.func.vmap(block)(state)

    def _narrow(self, call: _Call, place: int, state: _Channels) -> Tensor | _Channels | None:
        """One layer on one channel a coordinate, or None where it needs them all."""
        block, x, out = self.blocks[place], call.inputs[place], call.inputs[place + 1]
        values, channel = state.values, state.channel
        image = values.ndim == 4
        if type(block) in _ELEMENTWISE or (type(block) in _CHANNELWISE and image):
            return _Channels(block(values), channel)
        if isinstance(block, nn.Flatten) and block.start_dim == 1 and block.end_dim == -1:
            # still one channel, of which the next linear layer takes all entries
            return state
        if isinstance(block, _DropoutNd):
            if place not in call.masks:
                return state
            return _Channels(values * call.masks_of(place, channel, values.shape[2:]), channel)
        if isinstance(block, _BatchNorm) and values.ndim in (2, 4) and x.ndim == values.ndim:
            return _Channels(_normalised(block, values, channel), channel)
        if type(block) is nn.Linear and out.ndim == 2:
            weight, increment = self._factors(call, place, state)
            return out + torch.matmul(weight, increment).transpose(1, 2)
        if (
            type(block) is nn.Conv2d
            and image
            and block.groups == 1
            and block.padding_mode == "zeros"
            and not isinstance(block.padding, str)
        ):
            whole = out.new_empty(len(values), *out.shape)
            increment = values - call.channels(place, channel, values.shape[2:])
            # coordinates are sorted by channel
            distinct, counts = channel.unique_consecutive(return_counts=True)
            shares = zip(distinct.tolist(), increment.split(counts.tolist()), whole.split(counts.tolist()), strict=True)
            for one, some, target in shares:
                weight = block.weight[:, one : one + 1]
                part = F.conv2d(some.flatten(0, 1)[:, None], weight, None, block.stride, block.padding, block.dilation)
                torch.add(part.view_as(target), out, out=target)
            return whole
        return None

    def _factors(self, call: _Call, place: int, state: _Channels) -> tuple[Tensor, Tensor]:
        """What one channel a coordinate adds to the outputs of a linear layer, as factors of a product.

        Returns:
            Weights, shape ``(K, out_features, S)``, and increments, shape ``(K, S, B)``; a channel that was flattened
            has several entries ``S``.

        """
        block: Any = self.blocks[place]
        values = state.values
        increment = values - call.channels(place, state.channel, values.shape[2:])
        weight = block.weight.view(block.out_features, -1, values[0, 0].numel())
        return weight.transpose(0, 1).contiguous()[state.channel], _entries(increment).transpose(1, 2)

    def _whole(self, call: _Call, place: int, state: Tensor | _Channels) -> Tensor:
        if isinstance(state, Tensor):
            return state
        x = call.inputs[place]
        count = len(state.channel)
        whole = x.repeat(count, *[1] * x.ndim)
        by_channel = whole.view(count, len(x), -1, state.values[0, 0].numel())
        by_channel[torch.arange(count, device=x.device), :, state.channel] = _entries(state.values)
        return whole

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

    def _cross_entropies(self, loss: NearbyCrossEntropy, state: _Channels, unfinished: bool) -> Tensor | None:
        """Losses after one channel a coordinate, or None where the last block is not a linear layer."""
        call, last = self._calls[0], len(self.blocks) - 1
        if type(self.blocks[last]) is not nn.Linear or call.inputs[-1].ndim != 2:
            return None
        if unfinished:
            return loss.of_products(*self._factors(call, last, state))
        return loss.of_one_logit(state.channel, state.values - call.channels(last + 1, state.channel, ()))

    def _scalars(self, found: Any, count: int) -> Tensor:
        if not isinstance(found, Tensor) or found.numel() != count or not found.is_floating_point():
            self.oracle.scalar(found[0] if isinstance(found, Tensor) else found)
        found = found.reshape(count)
        return found if found.dtype.itemsize >= 4 else found.float()

    def _loss_of(self, *outputs: Tensor) -> Tensor:
        calls = iter(zip(outputs, self._calls, strict=True))

        def forward(*_: Any, **__: Any) -> Tensor:
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


def _channels_first(x: Tensor, entries: int) -> Tensor:
    """A batch as ``(C, B, entries)``; after a flattening the channels still follow one another."""
    return x.reshape(len(x), -1, entries).transpose(0, 1)


def _statistics(block: Any, values: Tensor, channel: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance that a BatchNorm layer normalises with; see :func:`_normalised`."""
    if block.training or block.running_mean is None:
        dims = [1, *range(2 if channel is not None else 3, values.ndim)]
        variance, mean = torch.var_mean(values, dim=dims, correction=0, keepdim=True)
        return mean, variance
    return _per_channel(block.running_mean, values, channel), _per_channel(block.running_var, values, channel)


def _standardised(block: Any, values: Tensor, channel: Tensor | None) -> Tensor:
    mean, variance = _statistics(block, values, channel)
    return (values - mean) / (variance + block.eps).sqrt()


def _normalised(block: Any, values: Tensor, channel: Tensor | None) -> Tensor:
    """A BatchNorm layer on one channel a coordinate, ``(K, B, ...)``, or on all of them, ``(K, B, C, ...)``."""
    out = _standardised(block, values, channel)
    if block.weight is not None:
        out = out * _per_channel(block.weight, values, channel) + _per_channel(block.bias, values, channel)
    return out


def _per_channel(value: Tensor, values: Tensor, channel: Tensor | None) -> Tensor:
    if channel is None:
        return value.view(1, 1, -1, *[1] * (values.ndim - 3))
    return value[channel].view(-1, *[1] * (values.ndim - 1))


def _entries(values: Tensor) -> Tensor:
    """Values of one channel a coordinate as ``(K, B, entries)``."""
    return values.view(*values.shape[:2], -1)


def _fan_in(block: nn.Module) -> float:
    """Multiplications for a number of a block's output, summed over its layers."""
    return float(sum(parameter[0].numel() for parameter in block.parameters() if parameter.ndim > 1))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _in_place(block: nn.Module) -> bool:
    return any(getattr(module, "inplace", False) for module in block.modules())


def _random(block: nn.Module) -> bool:
    """Whether a block that is no plain dropout draws random numbers, as far as its layers tell."""
    if isinstance(block, _DropoutNd):
        return type(block).__name__ not in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d")
    words = ("Dropout", "DropPath", "StochasticDepth", "DropBlock", "RReLU")
    return any(word in type(module).__name__ for module in block.modules() for word in words)
