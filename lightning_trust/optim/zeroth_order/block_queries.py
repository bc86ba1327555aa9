"""Losses at many coordinates in one pass, from the inputs of the blocks that a clean pass left.

Three levers multiply. Many coordinates are evaluated at a time, stacked along the samples. What comes before the block
of a coordinate is not computed again. And one coordinate of a convolution or linear layer changes one channel of its
output: until the next such layer only that channel is computed, and that layer adds the increment of one channel to
what it gave in the clean pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from lightning_trust.core.blocks import split
from lightning_trust.core.modes import unused_running_statistics
from lightning_trust.core.weights import substituted
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
#: bytes of outputs that are evaluated at a time, where nothing else is
_CACHE = 1 << 20
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
        self._targets: Tensor | None = None
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
        queries._recognise_cross_entropy()
        # what is subtracted from all others is rounded as they are
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
        """Whether the loss depends on weights otherwise than through the network's outputs, as a penalty does."""
        inside = [self.oracle.parameters[name] for name in self.block_of]
        kept = [parameter.detach().clone() for parameter in inside]
        try:
            for parameter in inside:
                parameter.data.add_(1.0)
            found = self.oracle.scalar(self._loss_of(*(call.inputs[-1] for call in self._calls)))
        finally:
            for parameter, value in zip(inside, kept, strict=True):
                parameter.data.copy_(value)
        return not same_loss(found, self.base)

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
                outputs = [self._outputs(call, name, block, some, by) for call in self._calls]
                found.append(self._losses_of(outputs))
                self.evaluations += len(some) * (len(self.blocks) - block) * len(self._calls)
        return torch.cat(found)

    def costs(self, name: str) -> float:
        """About the time that a coordinate of a parameter takes, in passes over one number."""
        return sum(self._cost(call, self.block_of[name]) for call in self._calls)

    def _cost(self, call: _Call, first: int) -> float:
        """Measured weights: a multiplication in a product costs 0.4 of writing a number, a pool or the loss 4 of it."""
        block, out = self.blocks[first], call.inputs[first + 1]
        narrow = isinstance(block, (nn.Linear, nn.Conv2d, _BatchNorm))
        total = 4.0 * out.numel() / (out.shape[1] if narrow and out.ndim > 1 else 1.0)
        if not narrow:
            total += 0.4 * out.numel() * _fan_in(block)
        for place in range(first + 1, len(self.blocks)):
            block, x, out = self.blocks[place], call.inputs[place], call.inputs[place + 1]
            channels = x.shape[1] if narrow and x.ndim > 1 else 1
            if isinstance(block, (nn.Linear, nn.Conv2d)):
                total += out.numel() * (1.0 + 0.4 * _fan_in(block) / channels)
                narrow = False
            elif isinstance(block, (*_SAMPLEWISE, _BatchNorm, _DropoutNd)):
                total += (4.0 if isinstance(block, _CHANNELWISE) else 1.0) * x.numel() / channels
            else:
                total += out.numel() * (1.0 + 0.4 * _fan_in(block))
                narrow = False
        return total + 4.0 * call.inputs[-1].numel()

    def _chunk(self, name: str) -> int:
        block = self.block_of[name]
        largest = max(x.numel() * x.element_size() for call in self._calls for x in call.inputs[block + 1 :])
        own = self.oracle.parameters[name]
        if not isinstance(self.blocks[block], (nn.Linear, nn.Conv2d, _BatchNorm)):
            largest += own.numel() * own.element_size()
        # the input and the output of a layer, and what it works in
        chunk = max(1, int(self.memory / (3 * largest)))
        if self._targets is None:
            return chunk
        # outputs that stay in a cache are read and written several times as fast
        outputs = self._calls[0].inputs[-1]
        return min(chunk, max(16, _CACHE // (outputs.numel() * outputs.element_size())))

    def _outputs(self, call: _Call, name: str, first: int, places: Tensor, by: float) -> Tensor:
        """Outputs of the network, shape ``(K, B, ...)``."""
        state: Tensor | _Channels = self._moved(call, name, first, places, by)
        for place in range(first + 1, len(self.blocks)):
            state = self._through(call, place, state)
        return self._whole(call, len(self.blocks), state)

    # -- the block of the coordinate -----------------------------------------------------------------------------------
    def _moved(self, call: _Call, name: str, place: int, places: Tensor, by: float) -> Tensor | _Channels:
        block, x, out = self.blocks[place], call.inputs[place], call.inputs[place + 1]
        parameter = self.oracle.parameters[name]
        bias = getattr(block, "bias", None)
        inner = parameter[0].numel() if parameter.ndim else 1
        channel, within = places // max(inner, 1), places % max(inner, 1)
        if type(block) is nn.Linear and x.ndim == 2:
            column = torch.full_like(x[:, :1], by).T if parameter is bias else by * x.T[within]
            return _Channels(out.T[channel] + column, channel)
        if type(block) is nn.Conv2d and block.padding_mode == "zeros" and not isinstance(block.padding, str):
            before = out.transpose(0, 1)[channel]
            if parameter is bias:
                return _Channels(before + by, channel)
            groups = block.groups
            # a row of the unfolded input for each entry of a filter; filters of a group see the group's channels
            rows = (channel // (block.out_channels // groups)) * inner + within
            distinct, inverse = rows.unique(return_inverse=True)
            patches = _unfolded(block, x, distinct)
            return _Channels(before + by * patches[inverse].view(len(places), *before.shape[1:]), channel)
        if isinstance(block, _BatchNorm) and x.ndim in (2, 4):
            before = out.transpose(0, 1)[places]
            if parameter is bias:
                return _Channels(before + by, places)
            values = x.transpose(0, 1)[places]
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
            masks = self._channels_of(call.masks[place], channel, values)
            return _Channels(values * masks, channel)
        if isinstance(block, _BatchNorm) and values.ndim in (2, 4) and x.ndim == values.ndim:
            return _Channels(_normalised(block, values, channel), channel)
        increment = values - self._channels_of(x, channel, values)
        if type(block) is nn.Linear and out.ndim == 2:
            # a channel that was flattened has several entries
            weight = block.weight.view(block.out_features, -1, values[0, 0].numel())[:, channel]
            if weight.shape[2] == 1:
                # classes before samples: a softmax over a short last dimension takes many times longer
                change = torch.addcmul(out.T, weight.transpose(0, 1), increment.flatten(1)[:, None])
                return change.transpose(1, 2)
            return out + torch.einsum("kbs,oks->kbo", _entries(increment), weight)
        if (
            type(block) is nn.Conv2d
            and image
            and block.groups == 1
            and block.padding_mode == "zeros"
            and not isinstance(block.padding, str)
        ):
            parts = []
            # coordinates are sorted by channel
            distinct, counts = channel.unique_consecutive(return_counts=True)
            for one, some in zip(distinct.tolist(), increment.split(counts.tolist()), strict=True):
                weight = block.weight[:, one : one + 1]
                part = F.conv2d(some.flatten(0, 1)[:, None], weight, None, block.stride, block.padding, block.dilation)
                parts.append(part.view(*some.shape[:2], *part.shape[1:]))
            return torch.cat(parts).add_(out)
        return None

    @staticmethod
    def _channels_of(x: Tensor, channel: Tensor, values: Tensor) -> Tensor:
        """Channels of a tensor of the clean pass, one a coordinate, shaped like ``values``."""
        # after a flattening the channels still follow one another
        return x.view(len(x), -1, values[0, 0].numel()).transpose(0, 1)[channel].view_as(values)

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
        if self._targets is not None:
            return self._cross_entropies(outputs[0], self._targets)
        if self.vectorized:
            try:
                with _SamplesLast():
                    found = torch.func.vmap(self._loss_of, randomness="same")(*outputs)
                return self._scalars(found, count)
            except (RuntimeError, TypeError, ValueError):
                # a step that asks for the value of a tensor, or writes to one, cannot be vectorised; one that is wrong
                # says so below
                self.vectorized = False
        return torch.stack([self.oracle.scalar(self._loss_of(*(each[k] for each in outputs))) for k in range(count)])

    @torch.no_grad()
    def _recognise_cross_entropy(self) -> None:
        """See whether the loss is the mean cross-entropy of the network's output and nothing else.

        Then it needs no evaluation of the whole step for every coordinate.
        """
        if len(self._calls) != 1:
            return
        output, watch = self._calls[0].inputs[-1], _Watch()
        with watch:
            found = self._loss_of(output)
        if len(watch.calls) == 1:
            logits, targets, settings, result = watch.calls[0]
            if logits is output and result is found and output.ndim == 2 and _plain_mean(targets, settings):
                self._targets = targets

    def _cross_entropies(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropies of outputs ``(K, B, C)``, which are used up."""
        first = outputs.transpose(1, 2)
        # relative to the greatest logits of the clean pass, from which a coordinate leads not far away
        top = self._calls[0].inputs[-1].amax(dim=1)
        moved = first.sub(top).contiguous()
        chosen = moved.gather(1, targets.expand(len(moved), 1, -1))[:, 0]
        found = (moved.exp_().sum(dim=1).log_() - chosen).mean(dim=1)
        if not bool(torch.isfinite(found).all()):
            # it led far away, or is no number
            chosen = first.gather(1, targets.expand(len(first), 1, -1))[:, 0]
            found = (first.logsumexp(dim=1) - chosen).mean(dim=1)
        return found if found.dtype.itemsize >= 4 else found.float()

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


class _Watch(TorchFunctionMode):
    """Keeps the calls of cross-entropy: logits, targets, settings and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Tensor, dict[str, Any], Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.cross_entropy and len(args) == 2:
            self.calls.append((args[0], args[1], kwargs, result))
        return result


class _SamplesLast(TorchFunctionMode):
    """Lets a mean cross-entropy over few classes run along the samples.

    The loss is the same; a softmax over a short last dimension takes many times longer than one over the first, and a
    batched negative log-likelihood is made of many small operations.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and len(args) == 2 and _plain_mean(args[1], kwargs):
            classes_first = args[0].T
            chosen = classes_first.gather(0, args[1][None])[0]
            return (classes_first.logsumexp(0) - chosen).mean()
        return func(*args, **kwargs)


def _plain_mean(targets: Tensor, settings: dict[str, Any]) -> bool:
    """Whether a cross-entropy is the mean over samples with one class each, none of which is ignored."""
    others = {
        "weight": None,
        "size_average": None,
        "ignore_index": -100,
        "reduce": None,
        "reduction": "mean",
        "label_smoothing": 0.0,
    }
    plain = all(name in others and others[name] == value for name, value in settings.items())
    return plain and targets.ndim == 1 and not targets.is_floating_point() and bool((targets >= 0).all())


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


def _unfolded(block: nn.Conv2d, x: Tensor, rows: Tensor) -> Tensor:
    """Rows of the unfolded input of a convolution, shape ``(R, B, H' * W')``."""
    columns = F.unfold(x, block.kernel_size, block.dilation, block.padding, block.stride)  # type: ignore[arg-type]
    return columns.transpose(0, 1)[rows]


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
