"""What is attached to a host: one chain around its step, one order of gradient edits and weight constraints, claims.

Order of one step: ``prepare`` of every transform in list order, kept for all evaluations of the micro-batch; the
gradient source around the nested losses; gradient edits by phase; the optimizer; constraints by phase.
"""

from __future__ import annotations

import copy
import enum
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import SUPPORTED_STRATEGIES, check_strategy, from_first_rank
from lightning_trust.core.host import ATTACHMENT, WrappedMethod, find_network, overrides
from lightning_trust.core.modes import untouched_batchnorm
from lightning_trust.core.randomness import (
    RandomStreams,
    RepeatedDraws,
    default_seed,
    random_state,
)

Stage = Literal["fit", "validate", "test", "predict"]
Claim = Literal[
    "inputs",
    "labels",
    "loss",
    "replaces_loss",
    "gradient_source",
    "gradient_edit",
    "weights",
    "data_order",
    "network",
    "unlearning",
]
# what only one callback of a run may claim, and how an error says it
EXCLUSIVE_CLAIMS: dict[str, str] = {
    "inputs": "perturb the inputs of the batch",
    "labels": "change the labels of the batch",
    "replaces_loss": "replace the loss of the host",
    "gradient_source": "be the source of the gradient",
    "data_order": "decide the order of the data",
    "network": "wrap the network",
    "unlearning": "be the unlearning method of the run",
}
_STEPS: dict[Stage, str] = {
    "fit": "training_step",
    "validate": "validation_step",
    "test": "test_step",
    "predict": "predict_step",
}


class BuildPhase(enum.IntEnum):
    """Order of what happens to a network once the host has built it."""

    LOAD = 0
    WRAP = 1


class GradientPhase(enum.IntEnum):
    """Order of gradient edits between the backward pass (unscaled) and clipping."""

    SCALE = 0
    ADD = 1
    PROJECT = 2


class ConstraintPhase(enum.IntEnum):
    """Order of weight constraints after an optimizer step. Zero comes last: a pruned weight never comes back."""

    PROXIMAL = 0
    CLAMP = 1
    HOLD = 2
    ZERO = 3


@dataclass(frozen=True)
class StepContext:
    """What a transform may want to know about the step it is in.

    Attributes:
        trainer: The Trainer.
        stage: ``"fit"`` in training steps, else the stage of the step (``"validate"`` inside fit as well).
        batch_idx: Index of the batch in its epoch.
        dataloader_idx: Index of the evaluation data loader.
        total_batch_idx: Index of the micro-batch in the whole run; the key of random draws.

    """

    trainer: Any
    stage: Stage
    batch_idx: int
    dataloader_idx: int
    total_batch_idx: int


class _SkippedStepError(Exception):
    """The host returned None: Lightning skips the batch, and so do we."""


class Attachment:
    """All that the callbacks of a run have attached to one host; there is one a host, and it ends with the run.

    Whatever is set on the host goes through it, so that everything is taken back in the opposite order when the last
    callback leaves, however the run ended.
    """

    def __init__(self, trainer: Any = None, host: Any = None) -> None:
        self.trainer = trainer
        self.host = host
        self.methods: dict[str, WrappedMethod] = {}
        self.callbacks: list[HostCallback] = []
        self.undo = ExitStack()
        # sub-modules that callbacks added to the host, by name
        self.parts: dict[str, nn.Module] = {}
        self.pass_seconds = 0.0
        self._edits: list[tuple[GradientPhase, HostCallback, Callable[[Optimizer], None]]] = []
        self._constraints: list[tuple[ConstraintPhase, HostCallback, Callable[[Optimizer], None]]] = []
        self._builds: list[tuple[BuildPhase, HostCallback, Callable[[nn.Module], None]]] = []
        self._hooked: dict[int, Any] = {}
        self.chains: dict[Stage, StepChain] = {}

    # a copy of the host runs its own plain steps: nothing of ours comes along but the way back to them
    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        twin = Attachment()
        memo[id(self)] = twin
        twin.host = copy.deepcopy(self.host, memo)
        for name, method in self.methods.items():
            twin.methods[name] = method.bare()
            twin.methods[name].instance = copy.deepcopy(method.instance, memo)
        return twin

    def __reduce__(self) -> tuple[type[Attachment], tuple[()]]:
        return Attachment, ()

    @staticmethod
    def on(host: nn.Module) -> Attachment | None:
        """What is attached to a host, or None."""
        return host.__dict__.get(ATTACHMENT)

    @staticmethod
    def join(callback: HostCallback, trainer: Any, host: nn.Module) -> Attachment:
        """Attach a callback to a host; links of an earlier run that ended badly are dropped first."""
        check_claims(trainer.callbacks)
        order = {id(member): place for place, member in enumerate(trainer.callbacks)}
        attachment = Attachment.on(host)
        if attachment is not None:
            # setup runs in list order: a link of a callback that does not come earlier is left from another run
            place = order.get(id(callback), len(order))
            for member in attachment.callbacks.copy():
                if order.get(id(member), place) >= place:
                    member.attachment = None
                    attachment.leave(member)
            if not attachment.callbacks:
                # a copy of a host in mid-run brings an attachment without callbacks
                attachment.close()
                attachment = None
        if attachment is None:
            attachment = Attachment(trainer, host)
            object.__setattr__(host, ATTACHMENT, attachment)
        attachment.callbacks.append(callback)
        return attachment

    @property
    def live(self) -> bool:
        """Whether the run that attached is the one under way.

        Links that outlived their run, because some other callback failed on the way out, do nothing. Nor do links in a
        search for a learning rate or batch size: Lightning sets all callbacks aside for it.
        """
        if not self.callbacks or self.host._trainer is not self.trainer:
            return False
        first = self.callbacks[0]
        return any(callback is first for callback in self.trainer.callbacks)

    def leave(self, callback: HostCallback) -> None:
        """Detach one callback; with the last one, everything is taken back."""
        if not any(member is callback for member in self.callbacks):
            return
        self.callbacks = [member for member in self.callbacks if member is not callback]
        self._edits = [entry for entry in self._edits if entry[1] is not callback]
        self._constraints = [entry for entry in self._constraints if entry[1] is not callback]
        self._builds = [entry for entry in self._builds if entry[1] is not callback]
        for chain in self.chains.values():
            chain.remove(callback)
        if not self.callbacks:
            self.close()

    def close(self) -> None:
        """Take back all that was set on the host."""
        try:
            self.undo.close()
        finally:
            for method in self.methods.values():
                method.restore(self.host)
            self.methods.clear()
            for handle in self._hooked.values():
                handle[1].remove()
            self._hooked.clear()
            if self.host is not None:
                self.host.__dict__.pop(ATTACHMENT, None)

    def leads(self, callback: HostCallback) -> bool:
        """Whether a callback is the first of the run's: it does what is done once for all."""
        return bool(self.callbacks) and self.callbacks[0] is callback

    # -- methods of the host -------------------------------------------------------------------------------------------
    def wrap(self, host: nn.Module, name: str, wrapper: Callable[..., Any], order: int = 0) -> None:
        """Put ``wrapper(host, call, *args)`` around a method of the host until the run ends.

        Args:
            host: The host.
            name: Name of the method.
            wrapper: What is called in place of the method.
            order: Of two wrappers the one with the lower order is outside; the step chain has 0, a gradient source
                takes a lower one.

        """
        if name not in self.methods:
            self.methods[name] = WrappedMethod(host, name)
        self.methods[name].add(wrapper, order)

    def when_built(
        self, callback: HostCallback, host: nn.Module, phase: BuildPhase, action: Callable[[nn.Module], None]
    ) -> None:
        """Call ``action(host)`` once the host has built its network, before a checkpoint is restored and DDP wraps it.

        Hosts may build in ``__init__``, ``setup`` or ``configure_model``; all actions run after these, by phase.
        """
        if not self._builds:
            last = "configure_model" if overrides(host, "configure_model") else "setup"
            self.wrap(host, last, self._after_building)
        self._builds.append((phase, callback, action))

    def _after_building(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        builds, self._builds = sorted(self._builds, key=lambda entry: entry[0]), []
        for _, _, action in builds:
            action(host)
        return result

    # -- gradient edits and constraints --------------------------------------------------------------------------------
    def edit_gradients(self, callback: HostCallback, phase: GradientPhase, edit: Callable[[Optimizer], None]) -> None:
        """Run ``edit(optimizer)`` before every optimizer step, after unscaling, before clipping, in order of phase."""
        self._edits.append((phase, callback, edit))
        self._edits.sort(key=lambda entry: entry[0])

    def constrain(self, callback: HostCallback, phase: ConstraintPhase, apply: Callable[[Optimizer], None]) -> None:
        """Run ``apply(optimizer)`` after every optimizer step that was taken, in order of phase."""
        self._constraints.append((phase, callback, apply))
        self._constraints.sort(key=lambda entry: entry[0])

    def before_step(self, optimizer: Optimizer) -> None:
        """Edit the gradients that an optimizer is about to use."""
        if id(optimizer) not in self._hooked:
            self.arm()
        for _, _, edit in self._edits:
            edit(optimizer)

    def arm(self) -> None:
        """Hook the constraints to the run's optimizers, also to those that were made anew since."""
        if self._constraints:
            check_optimizers(self.trainer.optimizers, [callback for _, callback, _ in self._constraints])
        check_unscaling(self.trainer, [callback for phase, callback, _ in self._edits if phase < GradientPhase.PROJECT])
        current = {id(optimizer): optimizer for optimizer in self.trainer.optimizers}
        for key in [key for key, (optimizer, _) in self._hooked.items() if current.get(key) is not optimizer]:
            self._hooked.pop(key)[1].remove()
        for key, optimizer in current.items():
            if key not in self._hooked:
                self._hooked[key] = (optimizer, optimizer.register_step_post_hook(self._after_step))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        # a host may keep its optimizer for later runs
        if not self.live:
            return
        for _, _, apply in self._constraints:
            apply(optimizer)

    # -- the step ------------------------------------------------------------------------------------------------------
    def chain(self, stage: Stage = "fit") -> StepChain:
        """The chain around one of the host's steps; it is put there when it is first asked for."""
        if stage not in self.chains:
            self.chains[stage] = StepChain(self.trainer, stage)
            self.wrap(self.host, _STEPS[stage], self.chains[stage])
        return self.chains[stage]

    def end_batch(self) -> None:
        """Let go of the micro-batch that was kept for its evaluations."""
        for chain in self.chains.values():
            chain.forget()


class StepChain:
    """The one chain around a step of a host."""

    def __init__(self, trainer: Any, stage: Stage) -> None:
        self.trainer = trainer
        self.stage = stage
        # random state is kept only where a gradient source asks for evaluations that repeat it
        self.replayable = False
        self.transforms: list[StepTransform] = []
        self._nested: list[StepTransform] = []
        self.forget()

    def add(self, transform: StepTransform) -> None:
        """Add a transform; they join in list order."""
        self.transforms.append(transform)
        self._arrange()

    def remove(self, transform: HostCallback) -> None:
        """Take a transform out of the chain."""
        self.transforms = [member for member in self.transforms if member is not transform]
        self._arrange()

    def _arrange(self) -> None:
        # innermost first: the one that replaces the loss, then from the last in the list to the first, and outermost
        # those that evaluate all of it at other weights
        changing = [transform for transform in reversed(self.transforms) if transform.changes_loss]
        self._nested = sorted(changing, key=lambda each: (not each.replaces_loss, each.moves_weights))

    def forget(self) -> None:
        """Let go of the micro-batch that was kept for its evaluations."""
        self._kept: tuple[Any, Any, Any] | None = None
        self._evaluations = 0
        self._extras: Mapping[str, Any] | None = None
        self._replay: Callable[[RepeatedDraws | None], Tensor | None] | None = None
        self._start: dict[str, Any] = {}
        self._draws: RepeatedDraws | None = None
        self._other: Callable[[Any], Callable[[], Tensor | None]] | None = None

    def __call__(self, host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the step of the host with its transforms."""
        batch, rest = (args[0], args[1:]) if args else (kwargs.pop("batch"), ())
        context = self._context(*rest, **kwargs)
        if self.stage != "fit":
            return call(self._prepared(host, batch, context), *rest, **kwargs)
        key = (context.total_batch_idx, context.batch_idx)
        again = self._kept is not None and self._kept[0] == key and self._kept[1] is batch
        if not again:
            self.forget()
            self._kept = (key, batch, self._prepared(host, batch, context))
        once = functools.partial(self._once, host, call, rest, kwargs)
        self._other = functools.partial(self._replay_of, host, once, context)
        # an optimizer that evaluates the step several times logs it once
        with muted(host) if again else nullcontext():
            return self._evaluated(host, once, context)

    def _evaluated(self, host: Any, once: Callable[[Any], Any], context: StepContext) -> Any:
        prepared = self._kept[2] if self._kept is not None else None
        if not self._nested and not self.replayable:
            return once(prepared)
        step = self._step(host, once, context)
        self._extras = None
        if self.replayable and self._replay is None:
            self._start = random_state()
            self._replay = functools.partial(self._replayed, host, step, prepared, self._start)
        try:
            loss = step(prepared)
        except _SkippedStepError:
            return None
        return loss if self._extras is None else {**self._extras, "loss": loss}

    def _step(self, host: Any, once: Callable[[Any], Any], context: StepContext) -> Callable[[Any], Tensor]:
        step: Callable[[Any], Tensor] = functools.partial(self._loss_of, host, once)
        for transform in self._nested:
            step = functools.partial(_loss_around, transform, host, step, context)
        return step

    def replay_of(self, batch: Any) -> Callable[[], Tensor | None]:
        """What evaluates the loss of another batch, as :meth:`replay` does that of the current one.

        The batch is prepared once; it is on the host's device already.
        """
        if self._other is None:
            raise RuntimeError("Expected a training step to have run before another batch is evaluated, but none has.")
        return self._other(batch)

    def _replay_of(
        self, host: Any, once: Callable[[Any], Any], context: StepContext, batch: Any
    ) -> Callable[[], Tensor | None]:
        prepared = self._prepared(host, batch, context)
        return functools.partial(self._replayed, host, self._step(host, once, context), prepared, random_state(), None)

    def replay(self) -> Tensor | None:
        """Evaluate the loss of the current micro-batch once more.

        The prepared batch and the random state are those of the first evaluation; the host's logs and metrics are
        muted and BatchNorm statistics are given back. Weights may have been moved in between. None where the host
        skips the batch.
        """
        if self._replay is None:
            raise RuntimeError("Expected a training step to have run before its loss is evaluated again, but none has.")
        return self._replay(self._draws)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Evaluate the loss of the current micro-batch many times inside, at less cost a time."""
        self._draws = RepeatedDraws(self._start)
        try:
            yield
        finally:
            self._draws.finish()
            self._draws = None

    def _replayed(
        self,
        host: nn.Module,
        step: Callable[[Any], Tensor],
        prepared: Any,
        state: dict[str, Any],
        draws: RepeatedDraws | None,
    ) -> Tensor | None:
        alone = RepeatedDraws(state) if draws is None else draws
        with muted(host), untouched_batchnorm(host), self.trainer.precision_plugin.train_step_context():
            alone.rewind()
            try:
                return step(prepared)
            except _SkippedStepError:
                return None
            finally:
                if draws is None:
                    alone.finish()
                else:
                    draws.look()

    def _prepared(self, host: Any, batch: Any, context: StepContext) -> Any:
        for transform in self.transforms:
            batch = transform.prepare(host, batch, context)
        return batch

    def _context(self, batch_idx: int | None = None, dataloader_idx: int = 0, **_: Any) -> StepContext:
        # not every step takes an index
        if self.stage == "fit":
            total = self.trainer.fit_loop.total_batch_idx
            batch_idx = self.trainer.fit_loop.batch_idx if batch_idx is None else batch_idx
        else:
            if batch_idx is None:
                batch_idx = self.trainer._active_loop.batch_progress.current.ready - 1
            total = batch_idx
        return StepContext(self.trainer, self.stage, batch_idx, dataloader_idx, total)

    def _once(
        self, host: Any, call: Callable[..., Any], rest: tuple[Any, ...], kwargs: dict[str, Any], batch: Any
    ) -> Any:
        """Call the host's own step; its logs and metrics count in the first evaluation of a micro-batch."""
        self._evaluations += 1
        if self._evaluations == 1:
            return call(batch, *rest, **kwargs)
        with muted(host):
            return call(batch, *rest, **kwargs)

    def _loss_of(self, host: Any, once: Callable[[Any], Any], batch: Any) -> Tensor:
        output = once(batch)
        if output is None:
            raise _SkippedStepError
        if isinstance(output, Tensor):
            return output
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            if self._extras is None:
                self._extras = output
            return output["loss"]
        found = f"a dict with keys {list(output)}" if isinstance(output, Mapping) else type(output).__name__
        raise MisconfigurationException(
            f"Expected `{type(host).__name__}.training_step` to return a loss tensor or a dict with the key 'loss',"
            f" because {names(self.transforms)} works on the loss, but got {found}."
        )


def _loss_around(
    transform: StepTransform, host: Any, step: Callable[[Any], Tensor], context: StepContext, batch: Any
) -> Tensor:
    return transform.loss(host, step, batch, context)


@contextmanager
def muted(host: nn.Module) -> Iterator[None]:
    """Let a host's step run without leaving a trace in its logs and its torchmetrics."""
    from torchmetrics import Metric

    if host.__dict__.get("log") is _log_nothing:
        yield
        return
    metrics = [module for module in host.modules() if isinstance(module, Metric)]
    kept = [_metric_state(metric) for metric in metrics]
    logs: dict[str, Any] = {name: host.__dict__[name] for name in ("log", "log_dict") if name in host.__dict__}
    try:
        for name in ("log", "log_dict"):
            object.__setattr__(host, name, _log_nothing)
        yield
    finally:
        for name in ("log", "log_dict"):
            host.__dict__.pop(name, None)
        host.__dict__.update(logs)
        for metric, state in zip(metrics, kept, strict=True):
            metric.__dict__.update(state)


def _log_nothing(*_: Any, **__: Any) -> None:
    return None


def _metric_state(metric: Any) -> dict[str, Any]:
    own = {name: getattr(metric, name) for name in metric._defaults}
    state = {name: value.clone() if isinstance(value, Tensor) else list(value) for name, value in own.items()}
    counters = ("_update_count", "_computed", "_forward_cache")
    return {**state, **{name: metric.__dict__[name] for name in counters if name in metric.__dict__}}


def names(callbacks: list[Any]) -> str:
    """Class names of callbacks, for a message."""
    return " and ".join(dict.fromkeys(type(callback).__name__ for callback in callbacks))


def check_claims(callbacks: list[Any]) -> None:
    """Refuse two callbacks that claim what only one may have.

    Raises:
        MisconfigurationException: Naming both and the claim.

    """
    holders: dict[str, HostCallback] = {}
    for callback in callbacks:
        if not isinstance(callback, HostCallback):
            continue
        for claim in callback.all_claims:
            if claim in EXCLUSIVE_CLAIMS and claim in holders:
                both = f"{type(holders[claim]).__name__} and {type(callback).__name__}"
                raise MisconfigurationException(
                    f"{both} both want to {EXCLUSIVE_CLAIMS[claim]}; a run can have one. Remove one of them from"
                    " `callbacks`."
                )
            holders.setdefault(claim, callback)


def check_optimizers(optimizers: list[Optimizer], callbacks: list[HostCallback]) -> None:
    """Refuse optimizers under which weights cannot be held where they belong."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                f"{names(callbacks)} constrains weights after each optimizer step, but LBFGS moves them several times"
                " within one. Use another optimizer, such as SGD or AdamW."
            )


def check_unscaling(trainer: Any, callbacks: list[HostCallback]) -> None:
    """Refuse to edit gradients that are not yet unscaled; setting some to zero is all the same to them."""
    if not callbacks or getattr(trainer.precision_plugin, "scaler", None) is None:
        return
    if any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            f"{names(callbacks)} edits gradients, but a fused optimizer under precision '16-mixed' unscales them within"
            " its step. Pass `fused=False` to the optimizer, or use precision='bf16-mixed'."
        )


class HostCallback(Callback):
    """Base of all callbacks that attach to a host.

    A subclass overrides what it needs of

    * :meth:`attach`: after joining in ``setup``; here it registers steps, edits, constraints and builds;
    * :meth:`observe`: in ``on_fit_start`` of a fresh run, before anything changes the host;
    * :meth:`begin`: in ``on_fit_start`` of a fresh run; passes that read the weights belong here;
    * :meth:`resume`: in ``on_fit_start`` of a resumed run, with the saved state, in place of :meth:`begin`;
    * :meth:`state`: what a checkpoint keeps, as tensors and primitives.

    Args:
        name: Tells two callbacks of one class apart.
        seed: Seed of this callback's random draws; the one of ``seed_everything`` if None.

    """

    claims: ClassVar[tuple[Claim, ...]] = ()
    stages: ClassVar[tuple[Stage, ...]] = ("fit",)
    strategies: ClassVar[tuple[str, ...]] = SUPPORTED_STRATEGIES

    def __init__(self, name: str | None = None, seed: int | None = None) -> None:
        self.name = name
        self.seed = seed
        self.attachment: Attachment | None = None
        self.random = RandomStreams(0 if seed is None else seed, self.state_key)
        self._saved: dict[str, Any] | None = None
        self._started = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attachment": None}

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return type(self).__qualname__ if self.name is None else f"{type(self).__qualname__}[{self.name}]"

    @property
    def all_claims(self) -> tuple[Claim, ...]:
        """What this callback claims; see ``EXCLUSIVE_CLAIMS``."""
        return self.claims

    # -- for subclasses ------------------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Register what shall happen to the host in this run."""

    def observe(self, trainer: Any, host: Any) -> None:
        """Look at the host of a fresh fit as it came, before any callback's :meth:`begin` changes it."""

    def begin(self, trainer: Any, host: Any) -> None:
        """Start a fresh fit."""

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with a fit from a checkpoint; a callback without state starts afresh."""
        self.begin(trainer, host)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {}

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------
    def _takes_part(self, stage: str) -> bool:
        return str(getattr(stage, "value", stage)) in self.stages or (stage == "fit" and "validate" in self.stages)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the host's chain."""
        # a state left from `validate(ckpt_path=...)` belongs to no fit
        self._saved = None
        self._leave()
        if stage == "fit":
            self._started = False
        if not self._takes_part(stage):
            return
        check_strategy(type(self).__name__, trainer, self.strategies)
        self.attachment = Attachment.join(self, trainer, pl_module)
        seed = from_first_rank(default_seed() if self.seed is None else self.seed)
        self.random = RandomStreams(seed, self.state_key)
        self.attach(trainer, pl_module, self.attachment)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Compute or restore what the run needs, in list order."""
        if self.attachment is None:
            return
        if self.attachment.leads(self):
            self.attachment.arm()
            for member in self.attachment.callbacks:
                if member._saved is None:
                    member.observe(trainer, pl_module)
        saved, self._saved = self._saved, None
        if saved is None:
            self.begin(trainer, pl_module)
        else:
            self.resume(trainer, pl_module, saved)
        self._started = True

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook optimizers that were made anew."""
        if self.attachment is not None and self.attachment.leads(self):
            self.attachment.arm()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Edit gradients, once for all callbacks."""
        if self.attachment is not None and self.attachment.leads(self):
            self.attachment.before_step(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of what was kept of the batch."""
        # the last, because those before may evaluate the step here
        if self.attachment is not None and self.attachment.callbacks[-1] is self:
            self.attachment.end_batch()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the host as it was."""
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the host as it was; Lightning calls no teardown after an exception or Ctrl-C."""
        self._leave()

    def _leave(self) -> None:
        attachment, self.attachment = self.attachment, None
        if attachment is not None:
            attachment.leave(self)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; what was loaded, where the fit has not started, and nothing where nothing was."""
        if self._saved is not None:
            return self._saved
        return self.state() if self._started else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the fit starts."""
        self._saved = state_dict


class StepTransform(HostCallback):
    """Base of callbacks that change the batch or the loss of a step.

    What it logs from within a step goes through ``host.log``, which is muted when a step is evaluated again; its own
    ``self.log`` is not.

    Args:
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of one class apart.
        seed: Seed of this callback's random draws; the one of ``seed_everything`` if None.

    """

    #: whether the host's own loss does not count
    replaces_loss: bool = False
    #: whether its ``loss`` evaluates what lies inside at other weights: then everything else lies inside
    moves_weights: ClassVar[bool] = False

    def __init__(
        self,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(name=name, seed=seed)
        self.batch_spec = batch_spec or BatchSpec()
        self.network = network

    @property
    def all_claims(self) -> tuple[Claim, ...]:
        """What this callback claims."""
        return (*self.claims, "replaces_loss") if self.replaces_loss else self.claims

    @property
    def changes_loss(self) -> bool:
        """Whether this transform brings a ``loss`` of its own."""
        return type(self).loss is not StepTransform.loss

    def prepare(self, host: Any, batch: Any, ctx: StepContext) -> Any:
        """Change the batch of a step; runs once a micro-batch and is kept for all its evaluations."""
        return batch

    def loss(self, host: Any, step: Callable[[Any], Tensor], batch: Any, ctx: StepContext) -> Tensor:
        """Change the loss of a training step.

        Args:
            host: The host.
            step: Evaluates what lies inside, in the end the host's own step, on a batch; it may be called several
                times, of which the first counts for the host's logs and metrics.
            batch: The prepared batch.
            ctx: The step.

        Returns:
            The loss, a scalar.

        """
        return step(batch)

    def network_of(self, host: nn.Module) -> nn.Module:
        """The host's network."""
        return find_network(host, self.network)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the host's chain and the steps of the stage."""
        steps = [own for own in self.stages if own == stage or (stage == "fit" and own == "validate")]
        check_steps(self, pl_module, steps)
        super().setup(trainer, pl_module, stage)
        if self.attachment is not None:
            for own in steps:
                self.attachment.chain(own).add(self)


def check_steps(transform: StepTransform, host: Any, stages: list[Stage]) -> None:
    """Refuse hosts whose steps a transform cannot reach, before training starts."""
    import inspect

    owner = type(transform).__name__
    for name in (_STEPS[stage] for stage in stages):
        if "dataloader_iter" in inspect.signature(getattr(host, name)).parameters:
            raise MisconfigurationException(
                f"{owner} changes the batch of a step, but `{type(host).__name__}.{name}` takes `dataloader_iter`."
                " Let it take `batch, batch_idx`."
            )
    if "fit" not in stages:
        return
    if not overrides(host, "training_step"):
        raise MisconfigurationException(
            f"{owner} changes the training step, but {type(host).__name__} has no `training_step` that returns a loss."
        )
    if transform.changes_loss and not host.automatic_optimization:
        raise MisconfigurationException(
            f"{owner} changes the loss, but {type(host).__name__} optimises manually and keeps its loss to itself."
            " Set `automatic_optimization = True`, or use a callback that changes the batch only."
        )
