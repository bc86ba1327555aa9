"""A trained part around a frozen network: what goes in, what comes out, and nothing else of the host changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_trust.core.host import find_network
from lightning_trust.core.learning_rates import LearningRates, check_schedule, scheduled
from lightning_trust.core.step import Attachment, BuildPhase, Claim, HostCallback, Stage


class Surround(nn.Module):
    """What goes around a network: the network computes ``after(network(before(x)))``.

    Subclasses override :meth:`before`, :meth:`after` or both, and hold what is trained.
    """

    def __init__(self) -> None:
        super().__init__()
        # plain attributes: neither is state
        self.calls = 0
        self.leaves_outputs = False
        self.absent = False

    def before(self, inputs: Tensor) -> Tensor:
        """What the network is given for its inputs."""
        return inputs

    def after(self, outputs: Tensor) -> Tensor:
        """What the network's outputs become."""
        return outputs

    @contextmanager
    def outputs_as_they_are(self) -> Iterator[None]:
        """Within, the network's own outputs for changed inputs: :meth:`after` is left out."""
        found, self.leaves_outputs = self.leaves_outputs, True
        try:
            yield
        finally:
            self.leaves_outputs = found

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Within, the network is what it is without this part."""
        found, self.absent = self.absent, True
        try:
            yield
        finally:
            self.absent = found

    def enter(self, inputs: Tensor) -> Tensor:
        """Count a call and change its inputs."""
        self.calls += 1
        return inputs if self.absent else self.before(inputs)

    def leave(self, outputs: Tensor) -> Tensor:
        """Change outputs, unless they are asked for as they are."""
        return outputs if self.leaves_outputs or self.absent else self.after(outputs)


class Surrounded(nn.Module):
    """A frozen network with a part around it, on its own: for inference and for export, without Lightning.

    Args:
        network: The network; it is frozen and stays in eval mode.
        part: What goes around it.
        chunk: The network is given at most so many rows at a time; all if None. A part may make several of one.

    Example:
        >>> surrounded = Surrounded(nn.Linear(2, 1), Surround())
        >>> surrounded.train().network.training, [p.requires_grad for p in surrounded.network.parameters()]
        (False, [False, False])

    """

    def __init__(self, network: nn.Module, part: Surround, chunk: int | None = None) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"Expected argument `chunk` to be at least 1, but got {chunk}.")
        self.chunk = chunk
        self.network = network.requires_grad_(False)
        self.part = part
        #: what a file says that the part was read from
        self.card: dict[str, Any] = {}
        self.train(self.training)

    def train(self, mode: bool = True) -> Surrounded:
        """Set the mode of the part; the network stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs to what the part makes of the network's outputs."""
        entered = self.part.enter(inputs)
        if self.chunk is None or len(entered) <= self.chunk:
            return self.part.leave(self.network(entered))
        return self.part.leave(torch.cat([self.network(some) for some in entered.split(self.chunk)]))


class SurroundingCallback(HostCallback):
    """Base of callbacks that train a part around the host's network and nothing else.

    The host's parameters are frozen and its sub-modules stay in eval mode; the part becomes a sub-module of the host
    until the run ends, and only it is optimised. Checkpoints hold the host under its own keys, so that it loads as
    ever; the part is this callback's state. Validation, test and prediction see the network with the part.

    Args:
        part: What goes around the network.
        network: Name of the host's network; found by itself if None.
        optimizer: Called with the parameters of the part, gives the optimizer. The host's optimizers and schedules,
            left with the part's parameters, if None.
        schedule: Learning rate of ``optimizer``: ``"cosine"``, ``"cyclic"``, ``"constant"`` or a schedule of
            core.schedules, a factor at the epochs gone by.
        name: Tells two callbacks of one class apart.
        seed: Seed of this callback's random draws; the one of ``seed_everything`` if None.

    """

    claims: ClassVar[tuple[Claim, ...]] = ("network",)
    stages: ClassVar[tuple[Stage, ...]] = ("fit", "validate", "test", "predict")

    def __init__(
        self,
        part: Surround,
        network: str | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: LearningRates = "constant",
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(name=name, seed=seed)
        check_schedule(schedule)
        self.part = part
        self.network = network
        self.optimizer = optimizer
        self.schedule = schedule
        self._network: nn.Module | None = None
        self._modes: list[tuple[nn.Module, bool]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_network": None, "_modes": []}

    @property
    def part_name(self) -> str:
        """Name of the part among the host's sub-modules."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()
        return words if self.name is None else f"{words}_{re.sub(r'[^0-9A-Za-z_]', '_', self.name)}"

    def surrounded(self, host: nn.Module) -> Surrounded:
        """The host's network, frozen, with the part around it, for use without the host; both are shared.

        Args:
            host: The host, outside a run.

        """
        return Surrounded(find_network(host, self.network), self.part)

    # -- what happens to the host --------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Put the part around the network once the host has built it."""
        attachment.when_built(self, host, BuildPhase.WRAP, self._surround)
        if trainer.state.fn is not None and trainer.state.fn.value == "fit":
            attachment.wrap(host, "configure_optimizers", self._configured)
            attachment.wrap(host, "training_step", self._checked)

    def _surround(self, host: nn.Module) -> None:
        attachment = self.attachment
        assert attachment is not None  # noqa: S101  (it calls this)
        if hasattr(host, self.part_name):
            raise MisconfigurationException(
                f"{type(self).__name__} adds a sub-module '{self.part_name}' to the host, but {type(host).__name__} has"
                " an attribute of that name. Pass `name=...`."
            )
        network = find_network(host, self.network)
        self.check_network(host, network)
        self._network = network
        undo = attachment.undo
        for parameter in host.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                parameter.grad = None
                undo.callback(parameter.requires_grad_, True)
        host.add_module(self.part_name, self.part)
        attachment.parts[self.part_name] = self.part
        undo.callback(self._remove, host, attachment)
        self.part.calls = 0
        if network is host:
            # hooks of the host would also surround its steps, which a strategy may call as its forward
            attachment.wrap(host, "forward", self._forward)
        else:
            # bound to the part: a copy of the host has hooks of its own
            enter = network.register_forward_pre_hook(_Enter(self.part), with_kwargs=True)
            leave = network.register_forward_hook(_Leave(self.part))
            undo.callback(enter.remove)
            undo.callback(leave.remove)
        handle = host.register_load_state_dict_pre_hook(self._completed)
        undo.callback(handle.remove)

    def check_network(self, host: nn.Module, network: nn.Module) -> None:
        """Refuse a network that the part does not fit."""

    def _remove(self, host: nn.Module, attachment: Attachment) -> None:
        host._modules.pop(self.part_name, None)
        attachment.parts.pop(self.part_name, None)
        self._network = None
        for module, training in self._modes:
            module.training = training
        self._modes = []

    def _forward(self, _host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _entered(self.part, args, kwargs)
        return self.part.leave(call(*args, **kwargs))

    def _completed(self, host: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """A host's own weights load while the part is there."""
        own = f"{prefix}{self.part_name}."
        if not any(key.startswith(own) for key in state_dict):
            state_dict.update({f"{own}{key}": value for key, value in self.part.state_dict().items()})

    def _checked(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        calls = self.part.calls
        result = call(*args, **kwargs)
        if self.part.calls == calls and result is not None:
            raise MisconfigurationException(
                f"{type(self).__name__} surrounds the {type(self._network).__name__} of {type(host).__name__}, but its"
                " `training_step` did not call it: it uses another module, or calls `network.forward(x)` in place of"
                " `network(x)`. Pass `network='<name>'` of the module that it calls."
            )
        return result

    # -- the optimizer -------------------------------------------------------------------------------------------------
    def _configured(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        trained = [parameter for parameter in self.part.parameters() if parameter.requires_grad]
        if not trained:
            raise MisconfigurationException(
                f"{type(self).__name__} has nothing to train: its part has no parameter that requires a gradient."
            )
        if self.optimizer is not None:
            return scheduled(self.optimizer(self.parameter_groups()), self.schedule, host)
        result = call(*args, **kwargs)
        optimizers = list(_optimizers(result))
        if not optimizers:
            raise MisconfigurationException(
                f"{type(self).__name__} trains its part with the optimizer of {type(host).__name__}, but"
                " `configure_optimizers` returns none. Pass `optimizer=...`."
            )
        _restrict(optimizers, trained, type(self).__name__)
        return result

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as an optimizer takes it."""
        return [{"params": [parameter for parameter in self.part.parameters() if parameter.requires_grad]}]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put what is frozen in eval mode: BatchNorm statistics stay as they are, dropout is off."""
        self._freeze_modes(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep it in eval mode."""
        super().on_train_epoch_start(trainer, pl_module)
        self._freeze_modes(pl_module)

    def _freeze_modes(self, host: nn.Module) -> None:
        own = {id(module) for module in self.part.modules()} | {id(host)}
        found = [(module, module.training) for module in host.modules() if id(module) not in own]
        self._modes = self._modes or found
        for module, _ in found:
            module.training = False

    # -- state ---------------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """The part's parameters and buffers."""
        return {"part": {name: value.detach().cpu().clone() for name, value in self.part.state_dict().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the part what a checkpoint has of it, for a fit that goes on and for an evaluation."""
        super().load_state_dict(state_dict)
        self._load(state_dict)

    def _load(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        try:
            self.part.load_state_dict(state["part"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"Expected the checkpoint to hold the part of this {type(self).__name__}, but it does not fit: {error}"
            ) from error

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the checkpoint's part."""
        self._load(state)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Leave the host its own keys."""
        weights = checkpoint.get("state_dict", {})
        for key in [key for key in weights if key.startswith(f"{self.part_name}.")]:
            del weights[key]


def surrounding(trainer: Any, host: nn.Module, kind: type[Surround]) -> tuple[Surround, nn.Module] | None:
    """The part of a kind in a run, a callback's or one that the host was built with, and the network it surrounds."""
    for callback in trainer.callbacks:
        if isinstance(callback, SurroundingCallback) and isinstance(callback.part, kind):
            return callback.part, find_network(host, callback.network)
    for module in host.modules():
        if isinstance(module, Surrounded) and isinstance(module.part, kind):
            return module.part, module.network
    return None


def part_around(network: Any) -> Surround | None:
    """The part around a network, one that it was built with or one that a callback put there for a run."""
    network = getattr(network, "_orig_mod", network)
    if isinstance(network, Surrounded):
        return network.part
    hooks = getattr(network, "_forward_pre_hooks", {}).values()
    return next((hook.part for hook in hooks if isinstance(hook, _Enter)), None)


class _Enter:
    """A hook that changes inputs; it belongs to a part and is copied with it."""

    def __init__(self, part: Surround) -> None:
        self.part = part

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _entered(self.part, args, kwargs)


class _Leave:
    """A hook that changes outputs; it belongs to a part and is copied with it."""

    def __init__(self, part: Surround) -> None:
        self.part = part

    def __call__(self, _: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        return self.part.leave(outputs)


def _entered(part: Surround, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args and isinstance(args[0], Tensor):
        return (part.enter(args[0]), *args[1:]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: part.enter(value)}
    raise MisconfigurationException(
        f"{type(part).__name__} changes the inputs of a network that is called with a tensor, but got"
        f" {[type(value).__name__ for value in (*args, *kwargs.values())]}."
    )


def _optimizers(result: Any) -> Iterator[Optimizer]:
    """The optimizers in what ``configure_optimizers`` returns, in whatever form."""
    if isinstance(result, Optimizer):
        yield result
    elif isinstance(result, Mapping):
        yield from _optimizers(result.get("optimizer"))
    elif isinstance(result, Sequence) and not isinstance(result, str):
        for entry in result:
            yield from _optimizers(entry)


def _restrict(optimizers: list[Optimizer], trained: list[nn.Parameter], owner: str) -> None:
    """Leave optimizers what is trained and nothing else; parameters that none has go to the first one's first group."""
    held: set[int] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # in place: an optimizer may keep the list
            group["params"][:] = [parameter for parameter in group["params"] if parameter.requires_grad]
            held.update(id(parameter) for parameter in group["params"])
    missing = [parameter for parameter in trained if id(parameter) not in held]
    first = optimizers[0]
    if missing and first.state:
        raise MisconfigurationException(
            f"{owner} trains its part with the host's {type(first).__name__}, which made state for the host's"
            " parameters when it was built. Pass `optimizer=...`."
        )
    first.param_groups[0]["params"].extend(missing)


@torch.no_grad()
def checksum(module: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of all parameters and buffers of a module.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = checksum(layer)
        >>> _ = layer.weight.data.add_(1.0)
        >>> checksum(layer) == before
        False

    """
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
