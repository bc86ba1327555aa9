"""An estimate from forward passes in place of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar, get_args

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS

from lightning_trust.callbacks.zeroth_order.refused_autograd import refused_autograd
from lightning_trust.core.distributed import world_size
from lightning_trust.core.host import find_network, named_parameters, overrides
from lightning_trust.core.passes import transferred
from lightning_trust.core.randomness import random_state, set_random_state, untouched_random_state
from lightning_trust.core.step import Attachment, Claim, HostCallback, StepChain, names
from lightning_trust.optim.zeroth_order import (
    Estimate,
    GradientEstimator,
    LossOracle,
    ZerothOrderOptimizer,
)
from lightning_trust.optim.zeroth_order.oracle import Parallel, same_loss

#: Called with the host and what evaluates the loss of another batch: which entries are asked, by names of parameters.
MaskSource = Callable[[Any, Callable[[Any], Callable[[], Any]]], Mapping[str, Tensor]]


class ZerothOrderGradient(HostCallback):
    r"""Trains an unchanged module without back-propagation: an estimate from forward passes takes its place.

    The training step runs without a graph. With an ``estimator`` its estimate lands in ``.grad``, and everything after
    that is Lightning's own: accumulation, clipping, masks, any optimizer and scheduler, ``global_step``, checkpoints.
    Without one, the optimizer must be one that asks for losses itself (``MeZO``, ``ZOSGD`` and their kin), and nothing
    is stored that it does not store.

    A step of the host that asks for a derivative itself, by ``loss.backward()`` or ``torch.autograd.grad``, is refused;
    what other callbacks do around it, such as an attack, is not its affair.

    The step is evaluated as often as the estimate needs, all other callbacks' losses included, on the same batch and
    with the same random numbers, so that dropout is the same. The host's logs and metrics, BatchNorm statistics and the
    state of the random generators see one evaluation, at the weights as they are.

    On several ranks directions are the same and only values cross. With ``parallel="data"`` every rank has a batch of
    its own, and the values are averaged. With ``"queries"`` all ranks hold the same batch and each asks a share of the
    queries, of equal cost; then the Trainer must not give the ranks different data (``use_distributed_sampler=False``).

    Logs ``trust/zo_snr``, the squared length of the gradient over the mean squared error of its estimate, and
    ``trust/zo_queries``, the losses that this run has asked of a rank.

    Papers: DeepZero (ICLR 2024, arXiv:2310.02025); MeZO (NeurIPS 2023, arXiv:2305.17333).

    Args:
        estimator: Estimates the gradient: ``RGE``, ``CGE``, ``ForwardGradient``; None where the optimizer asks for
            losses itself.
        parallel: ``"data"`` or ``"queries"``.
        network: Name of the host's network; found by itself if None.
        clean_forward: Whether an optimizer that asks for losses itself is given one evaluation at the weights as they
            are, for logs and statistics. MeZO needs none: without it there are two evaluations a step in place of
            three, and logs and statistics see the first of them, at weights that are moved by ``mu``.
        name: Tells two callbacks of this class apart.
        seed: Seed of the directions; the one of ``seed_everything`` if None. An optimizer that asks for losses itself
            has its own.

    Attributes:
        queries: Losses that the run has asked of this rank so far.
        equivalent_forwards: What they cost in forward passes of the network.
        bytes_sent: Bytes that this rank handed to collective operations.

    Raises:
        ValueError: If an argument is out of its range (at once); if the loss is no finite scalar or differs between two
            evaluations (in the first step that has one).
        MisconfigurationException: Before training, if the host optimises manually, precision scales the loss, an
            estimator meets an optimizer that asks for losses itself, neither is there, or gradients are to be edited,
            clipped or accumulated where there are none; in a step that calls automatic differentiation.

    Warns:
        If the run is far shorter than those of the method's paper, or precision hides differences of ``mu``.

    Example:
        >>> from lightning_trust.optim import RGE
        >>> ZerothOrderGradient(RGE(q=10, mu=1e-3)).estimator.q
        10

    """

    claims: ClassVar[tuple[Claim, ...]] = ("gradient_source",)

    def __init__(
        self,
        estimator: GradientEstimator | None = None,
        parallel: Parallel = "data",
        network: str | None = None,
        clean_forward: bool = True,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(name=name, seed=seed)
        if parallel not in get_args(Parallel):
            raise ValueError(f"Expected argument `parallel` to be 'data' or 'queries', but got {parallel!r}.")
        self.estimator = estimator
        self.parallel: Parallel = parallel
        self.network = network
        self.clean_forward = clean_forward
        #: chooses which entries are asked, by the names of parameters; set by callbacks such as DynamicSparseGradient
        self.mask_source: MaskSource | None = None
        self.queries = 0
        self.equivalent_forwards = 0.0
        self.bytes_sent = 0
        self._found: Estimate | None = None
        self._chain: StepChain | None = None
        self._checked = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_chain": None, "_found": None, "mask_source": None}

    # -- attaching -----------------------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Take the place of the backward pass."""
        if not overrides(host, "training_step") or not host.automatic_optimization:
            raise MisconfigurationException(
                f"ZerothOrderGradient takes the place of Lightning's backward pass, but {type(host).__name__} "
                + (
                    "optimises manually. Set `automatic_optimization = True`."
                    if overrides(host, "training_step")
                    else "has no `training_step` that returns a loss."
                )
            )
        find_network(host, self.network)
        self._check_precision(trainer)
        self._checked = False
        self._chain = attachment.chain("fit")
        self._chain.replayable = True
        attachment.wrap(host, "training_step", self._without_graph, order=-1)
        attachment.wrap(host, "backward", self._estimate_gradient, order=-1)
        # inside of what other callbacks do with gradients of their own
        attachment.wrap(host, "training_step", _without_autograd, order=1)

    def _check_precision(self, trainer: Any) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "ZerothOrderGradient has no backward pass whose loss could be scaled, but got"
                f" precision='{trainer.precision}', which scales it. Use '32-true' or 'bf16-mixed'."
            )
        mu = getattr(self.estimator, "mu", None)
        if "16" in str(trainer.precision) and (mu is None or mu < 1e-2):
            at = "of its optimizer" if mu is None else f"of mu={mu:g}"
            rank_zero_warn(
                f"ZerothOrderGradient under precision='{trainer.precision}': differences {at} may be below what half"
                " precision can tell apart. See `trust/zo_snr`; use '32-true' or a larger `mu` where it is near 0."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what the optimizer and the other callbacks ask for."""
        if self.attachment is not None:
            self._check_optimizers(trainer, self.attachment)
        super().on_fit_start(trainer, pl_module)

    def _check_optimizers(self, trainer: Any, attachment: Attachment) -> None:
        asking = _asking(trainer)
        if self.estimator is not None:
            if asking:
                raise MisconfigurationException(
                    f"ZerothOrderGradient has the estimator {self.estimator!r}, but the optimizer"
                    f" {type(asking[0]).__name__} estimates by itself. Leave `estimator` out, or take an optimizer of"
                    " torch."
                )
            if any(isinstance(each, LBFGS) for each in trainer.optimizers):
                raise MisconfigurationException(
                    "ZerothOrderGradient estimates a gradient once a step, but LBFGS asks for many within one and"
                    " compares them. Use another optimizer, such as SGD or Adam."
                )
            self._warn_of_few_steps(trainer, self.estimator)
            return
        other = [each for each in trainer.optimizers if each not in asking]
        if other:
            raise MisconfigurationException(
                f"ZerothOrderGradient() without an estimator needs an optimizer that asks for losses itself, such as"
                f" MeZO, but got {type(other[0]).__name__}. Pass `estimator=RGE()` or `estimator=CGE()`."
            )
        owner = f"{type(asking[0]).__name__} takes no gradient, so there is none to"
        if trainer.accumulate_grad_batches > 1:
            raise MisconfigurationException(
                f"{owner} accumulate, but got accumulate_grad_batches={trainer.accumulate_grad_batches}. Use larger"
                " batches, or an estimator with an optimizer of torch."
            )
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"{owner} clip, but got gradient_clip_val={trainer.gradient_clip_val}. Remove it, or use an estimator"
                " with an optimizer of torch."
            )
        editors = [each for each in attachment.callbacks if "gradient_edit" in each.all_claims]
        if editors:
            raise MisconfigurationException(
                f"{owner} edit, but {names(editors)} edits gradients. Use an estimator with an optimizer of torch."
            )
        for optimizer in asking:
            optimizer.asks_through(self._oracle_of_step)
            optimizer.draws_batches(self._losses_of_batches)
            self._warn_of_few_steps(trainer, optimizer)

    @staticmethod
    def _warn_of_few_steps(trainer: Any, method: GradientEstimator | ZerothOrderOptimizer) -> None:
        published, steps = method.published_steps, trainer.estimated_stepping_batches
        if published is not None and steps < published / 10 and not trainer.fast_dev_run:
            rank_zero_warn(
                f"{type(method).__name__} makes little progress in a step: runs of its paper have {published:,} or"
                f" more, but this one has {steps:,.0f}."
            )

    # -- the step ------------------------------------------------------------------------------------------------------
    def _without_graph(self, host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            if self.parallel == "data" or world_size() == 1:
                return call(*args, **kwargs)
            # the ranks must draw the same dropout for the same batch; what others draw after it is none of ours
            with untouched_random_state():
                torch.manual_seed(self.random.sample_seed("step", host.trainer.fit_loop.total_batch_idx))
                return call(*args, **kwargs)

    def _estimate_gradient(self, host: Any, call: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.estimator is None:
            return
        windows = host.trainer.accumulate_grad_batches
        # the loss that comes here is divided already, and a division may have cost it digits
        clean = loss if windows == 1 else None
        seed = self.random.sample_seed("directions", host.trainer.fit_loop.total_batch_idx)
        with self._chain_of_run.replaying():
            oracle = self._oracle(host, self._chain_of_run.replay, seed, clean)
            self.note(self.estimator.add(oracle, 1.0 / windows))

    @property
    def _chain_of_run(self) -> StepChain:
        assert self._chain is not None  # noqa: S101  (attach)
        return self._chain

    def _oracle(self, host: Any, loss: Callable[[], Any], seed: int, clean: Tensor | None) -> LossOracle:
        parameters = self._trained(host)
        masks = {} if self.mask_source is None else self.mask_source(host, self._chain_of_run.replay_of)
        oracle = LossOracle(
            loss,
            parameters,
            module=host,
            network=find_network(host, self.network),
            masks={name: mask for name, mask in masks.items() if name in parameters},
            seed=seed,
            parallel=self.parallel,
            restores_random_state=True,
            clean=clean,
        )
        if not self._checked:
            if clean is None:
                oracle.check_repeatable()
            else:
                oracle.check_repeats(clean)
            oracle.queries = 0
            self._checked = True
        if oracle.splits and clean is not None:
            _check_same_batch(oracle.scalar(clean))
        return oracle

    def _trained(self, host: Any) -> dict[str, Tensor]:
        stepped = {
            id(parameter)
            for optimizer in host.trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        return {name: parameter for name, parameter in named_parameters(host).items() if id(parameter) in stepped}

    # -- optimizers that ask for losses themselves ---------------------------------------------------------------------
    def _oracle_of_step(self, closure: Callable[[], Any], seed: int) -> LossOracle | None:
        host, chain = self._host, self._chain_of_run
        # a loss is seen to be the same twice, and on all ranks, at the weights as they are
        if self.clean_forward or self.parallel == "queries" or not self._checked:
            clean = closure()
            return None if clean is None else self._oracle(host, chain.replay, seed, clean)
        return self._oracle(host, _FirstThenAgain(closure, chain.replay), seed, None)

    @property
    def _host(self) -> Any:
        assert self.attachment is not None  # noqa: S101  (a run is under way)
        return self.attachment.host

    def _losses_of_batches(self, count: int | None) -> Iterator[Callable[[], Any]]:
        """The run's loss on the first batches of the training data, for an anchor."""
        host, chain = self._host, self._chain_of_run
        with untouched_random_state():
            batches = islice(transferred(host.trainer, host, host.trainer.train_dataloader), count)
            state = random_state()
        while True:
            # data are read with the random numbers of the anchor's pass, losses with those of the step
            with untouched_random_state():
                set_random_state(state)
                batch = next(batches, None)
                state = random_state()
            if batch is None:
                return
            yield chain.replay_of(batch)

    # -- what the run tells its optimizer ------------------------------------------------------------------------------
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell which epoch begins."""
        super().on_train_epoch_start(trainer, pl_module)
        for optimizer in _asking(trainer):
            optimizer.begin_epoch(trainer.current_epoch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell what was logged."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            for optimizer in _asking(trainer):
                optimizer.look_at(trainer.callback_metrics)

    # -- what was found ------------------------------------------------------------------------------------------------
    def note(self, estimate: Estimate) -> None:
        """Count what an estimate cost, and log what it found."""
        self._found = estimate
        self.queries += estimate.queries
        self.equivalent_forwards += estimate.equivalent_forwards
        self.bytes_sent += estimate.bytes_sent

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the estimate found and cost."""
        for optimizer in _asking(trainer):
            if optimizer.last is not None:
                self.note(optimizer.last)
        if self._found is not None:
            pl_module.log("trust/zo_snr", self._found.snr)
            pl_module.log("trust/zo_queries", float(self.queries))
            self._found = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def begin(self, trainer: Any, host: Any) -> None:
        """Start a fresh fit."""
        self.queries, self.equivalent_forwards, self.bytes_sent = 0, 0.0, 0

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.queries, self.equivalent_forwards = state["queries"], state["forwards"]
        self.bytes_sent = state["bytes"]

    def state(self) -> dict[str, Any]:
        """What the queries have come to."""
        return {"queries": self.queries, "forwards": self.equivalent_forwards, "bytes": self.bytes_sent}

    def _leave(self) -> None:
        if self.attachment is not None and self.attachment.trainer is not None:
            for optimizer in _asking(self.attachment.trainer):
                optimizer.asks_through(None)
                optimizer.draws_batches(None)
        self._chain = None
        super()._leave()


def _asking(trainer: Any) -> list[ZerothOrderOptimizer]:
    """The optimizers that ask for losses themselves."""
    return [each for each in trainer.optimizers if isinstance(each, ZerothOrderOptimizer)]


def _without_autograd(host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with refused_autograd(f"{type(host).__name__}.training_step"):
        return call(*args, **kwargs)


class _FirstThenAgain:
    """Lightning's closure at the first call, which logs and runs the hooks, and replays of it afterwards."""

    def __init__(self, closure: Callable[[], Any], replay: Callable[[], Any]) -> None:
        self.closure: Callable[[], Any] | None = closure
        self.replay = replay

    def __call__(self) -> Any:
        if self.closure is None:
            return self.replay()
        first, self.closure = self.closure, None
        return first()


def _check_same_batch(clean: Tensor) -> None:
    """Refuse ranks whose losses differ at equal weights."""
    ends = torch.stack([clean, -clean])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    high, low = ends[0], -ends[1]
    if not same_loss(high, low):
        raise MisconfigurationException(
            "ZerothOrderGradient(parallel='queries') needs the same batch on all ranks, but their losses at equal"
            f" weights go from {float(low):.9g} to {float(high):.9g}. Use `Trainer(use_distributed_sampler=False)` with"
            " a sampler that is seeded alike on all ranks, or parallel='data'."
        )
