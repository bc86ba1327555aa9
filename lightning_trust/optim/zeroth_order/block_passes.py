"""How a change of single coordinates passes through the blocks of a network.

One coordinate of a convolution or linear layer changes one channel of its output: until the next such layer only that
channel is computed, and that layer adds the increment of one channel to what it gave in the clean pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_trust.core.weights import substituted

#: layers that work on each entry by itself
ELEMENTWISE = (
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
#: layers that work on each channel of an image by itself
CHANNELWISE = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
#: layers that work on each sample by itself, so that many batches can be laid one behind the other
SAMPLEWISE = (*ELEMENTWISE, *CHANNELWISE, nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.Flatten)


@dataclass
class Channels:
    """For each coordinate one channel: ``values[k]``, shape ``(B, ...)``, in the place of the clean ``channel[k]``."""

    values: Tensor
    channel: Tensor


class CleanCall:
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
                x = block(x.clone() if in_place(block) else x)
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


class BlockPasses:
    """Takes coordinates from the block that they lie in to the output of the network.

    Args:
        blocks: Modules whose composition is the network.
        memory: About how many bytes the coordinates that are evaluated at a time may take.

    """

    def __init__(self, blocks: Sequence[nn.Module], memory: int) -> None:
        self.blocks = blocks
        self.memory = memory

    # -- the block of the coordinate -----------------------------------------------------------------------------------
    def moved(self, call: CleanCall, parameter: Tensor, place: int, places: Tensor, by: float) -> Tensor | Channels:
        """The output of a block with single entries of a parameter of it moved, one a coordinate."""
        block, x, out = self.blocks[place], call.inputs[place], call.inputs[place + 1]
        bias = getattr(block, "bias", None)
        inner = parameter[0].numel() if parameter.ndim else 1
        channel, within = places // max(inner, 1), places % max(inner, 1)
        if type(block) is nn.Linear and x.ndim == 2:
            before = call.channels(place + 1, channel, ())
            change = by if parameter is bias else by * call.channels(place, within, ())
            return Channels(before.add_(change), channel)
        if type(block) is nn.Conv2d and block.padding_mode == "zeros" and not isinstance(block.padding, str):
            before = call.channels(place + 1, channel, out.shape[2:])
            if parameter is bias:
                return Channels(before + by, channel)
            groups = block.groups
            # a row of the unfolded input for each entry of a filter; filters of a group see the group's channels
            rows = (channel // (block.out_channels // groups)) * inner + within
            patches = call.patches(place, block, rows, self.memory // 3)
            return Channels(before.add_(patches.view_as(before), alpha=by), channel)
        if isinstance(block, _BatchNorm) and x.ndim in (2, 4):
            before = call.channels(place + 1, places, out.shape[2:])
            if parameter is bias:
                return Channels(before + by, places)
            values = call.channels(place, places, x.shape[2:])
            return Channels(before + by * _standardised(block, values, places), places)
        return self._any_block(block, x, parameter, places, by)

    @staticmethod
    def _any_block(block: nn.Module, x: Tensor, parameter: Tensor, places: Tensor, by: float) -> Tensor:
        name = next(own for own, value in block.named_parameters() if value is parameter)
        moved = parameter.detach().reshape(1, -1).repeat(len(places), 1)
        moved.scatter_add_(1, places[:, None], torch.full_like(moved[:, :1], by))
        values = moved.view(-1, *parameter.shape)

        def output(value: Tensor, inputs: Tensor) -> Tensor:
            with substituted(block, {name: value}):
                return block(inputs.clone() if in_place(block) else inputs)

        try:
            return torch.func.vmap(output, in_dims=(0, None))(values, x)
        except RuntimeError:
            # what the weight does not reach is written to in place: all of the block is computed for each coordinate
            return torch.func.vmap(output)(values, x.expand(len(places), *x.shape))

    # -- the blocks after it -------------------------------------------------------------------------------------------
    def through(self, call: CleanCall, place: int, state: Tensor | Channels) -> Tensor | Channels:
        """The output of a block that lies behind the coordinates."""
        block = self.blocks[place]
        if isinstance(state, Channels):
            narrow = self._narrow(call, place, state)
            if narrow is not None:
                return narrow
            state = self.whole(call, place, state)
        if place in call.masks:
            return state * call.masks[place]
        if isinstance(block, _BatchNorm) and state.ndim in (3, 5):
            return _normalised(block, state, None)
        if type(block) in SAMPLEWISE and not (isinstance(block, nn.Flatten) and block.start_dim != 1):
            out = block(state.flatten(0, 1))
            return out.view(*state.shape[:2], *out.shape[1:])
        if isinstance(block, _DropoutNd):
            return state
        return torch.func.vmap(block)(state)

    def _narrow(self, call: CleanCall, place: int, state: Channels) -> Tensor | Channels | None:
        """One layer on one channel a coordinate, or None where it needs them all."""
        block, x, out = self.blocks[place], call.inputs[place], call.inputs[place + 1]
        values, channel = state.values, state.channel
        image = values.ndim == 4
        if type(block) in ELEMENTWISE or (type(block) in CHANNELWISE and image):
            return Channels(block(values), channel)
        if isinstance(block, nn.Flatten) and block.start_dim == 1 and block.end_dim == -1:
            # still one channel, of which the next linear layer takes all entries
            return state
        if isinstance(block, _DropoutNd):
            if place not in call.masks:
                return state
            return Channels(values * call.masks_of(place, channel, values.shape[2:]), channel)
        if isinstance(block, _BatchNorm) and values.ndim in (2, 4) and x.ndim == values.ndim:
            return Channels(_normalised(block, values, channel), channel)
        if type(block) is nn.Linear and out.ndim == 2:
            weight, increment = self.factors(call, place, state)
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

    def factors(self, call: CleanCall, place: int, state: Channels) -> tuple[Tensor, Tensor]:
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

    def whole(self, call: CleanCall, place: int, state: Tensor | Channels) -> Tensor:
        """All channels of the input of a block."""
        if isinstance(state, Tensor):
            return state
        x = call.inputs[place]
        count = len(state.channel)
        whole = x.repeat(count, *[1] * x.ndim)
        by_channel = whole.view(count, len(x), -1, state.values[0, 0].numel())
        by_channel[torch.arange(count, device=x.device), :, state.channel] = _entries(state.values)
        return whole


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


def in_place(block: nn.Module) -> bool:
    """Whether a block writes into its input."""
    return any(getattr(module, "inplace", False) for module in block.modules())
