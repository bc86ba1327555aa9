"""Two players: what is trained lowers its loss, and hides the group of a sample from an adversary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.callbacks.prompting.fairness_evaluation import GroupCallback, logits_of, not_called
from lightning_trust.core.auxiliary import AuxiliaryOptimizer
from lightning_trust.core.batch import BatchSpec, Key
from lightning_trust.core.distributed import sum_over_ranks_, world_size
from lightning_trust.core.randomness import untouched_random_state
from lightning_trust.core.step import Attachment, Claim, StepContext
from lightning_trust.core.taps import captured_outputs
from lightning_trust.functional.prompting import conflict_free_gradient
from lightning_trust.nn import FairnessAdversary
from lightning_trust.nn.prompting.fairness_adversary import FairnessCriterion


class TwoPlayers(GroupCallback):
    """Base of callbacks whose gradient has an adversary in it.

    The gradient of a step is :func:`~lightning_trust.functional.prompting.conflict_free_gradient` of the host's loss
    and the adversary's, both averaged over micro-batches and ranks before they are combined. The adversary takes its
    own step on the same outputs after the host's optimizer has.
    """

    criterion: FairnessCriterion
    lmbda: float
    project: bool
    adversary: FairnessAdversary | None

    def play(
        self,
        criterion: FairnessCriterion,
        lmbda: float,
        hidden: Sequence[int],
        use_logits: bool,
        overlapping: bool,
        adversary_lr: float,
        adversary_weight_decay: float,
        project: bool,
    ) -> None:
        """Say who plays."""
        if not 0.0 <= lmbda < math.inf:
            raise ValueError(f"Expected argument `lmbda` to be at least 0, but got {lmbda}.")
        if not adversary_lr > 0.0:
            raise ValueError(f"Expected argument `adversary_lr` to be positive, but got {adversary_lr}.")
        if not adversary_weight_decay >= 0.0:
            raise ValueError(
                f"Expected argument `adversary_weight_decay` to be at least 0, but got {adversary_weight_decay}."
            )
        self.criterion = criterion
        self.lmbda = lmbda
        self.hidden = hidden
        self.use_logits = use_logits
        self.overlapping = overlapping
        self.adversary_lr = adversary_lr
        self.adversary_weight_decay = adversary_weight_decay
        self.project = project
        #: the adversary of the run, and of the last one
        self.adversary = None
        self._opponent: AuxiliaryOptimizer | None = None
        self._steps = 0
        self._clear()
        # a first one, to see that the arguments are good
        with untouched_random_state():
            self._new_adversary()

    def __getstate__(self) -> dict[str, Any]:
        left: dict[str, Any] = {"_opponent": None, "_known": None, "_logits": None, "_sums": None, "_played": []}
        return {**super().__getstate__(), **left}

    def _clear(self) -> None:
        # targets and groups of the micro-batch, the network's outputs for it
        self._known: tuple[Tensor, Tensor] | None = None
        self._logits: Tensor | None = None
        # gradients of both losses since the last step, and what they were of
        self._sums: tuple[list[Tensor], list[Tensor]] | None = None
        self._played: list[tuple[Tensor, Tensor, Tensor]] = []

    def _new_adversary(self) -> FairnessAdversary:
        return FairnessAdversary(
            self.num_classes, self.num_groups, self.criterion, self.hidden, self.use_logits, self.overlapping
        )

    # -- attaching -----------------------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Take the place of the backward pass."""
        GroupCallback.attach(self, trainer, host, attachment)
        self._clear()
        attachment.wrap(host, "backward", self._backward, order=-1)

    def begin(self, trainer: Any, host: Any) -> None:
        """Make the adversary, equal on all ranks."""
        with untouched_random_state():
            torch.manual_seed(self.random.sample_seed("adversary"))
            adversary = self._new_adversary()
        # no gradients but in its own step
        self.adversary = adversary.to(host.device).requires_grad_(False)
        self._opponent = AuxiliaryOptimizer(
            list(self.adversary.parameters()),
            lambda parameters: torch.optim.Adam(
                parameters, lr=self.adversary_lr, weight_decay=self.adversary_weight_decay
            ),
        )

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Make the adversary and go on with it."""
        TwoPlayers.begin(self, trainer, host)
        if state and self.adversary is not None and self._opponent is not None:
            self.adversary.load_state_dict(state["adversary"])
            self._opponent.load_state_dict(state["adversary_optimizer"])

    def state(self) -> dict[str, Any]:
        """The adversary and its optimizer."""
        if self.adversary is None or self._opponent is None:
            return {}
        weights = {name: value.detach().cpu().clone() for name, value in self.adversary.state_dict().items()}
        return {"adversary": weights, "adversary_optimizer": self._opponent.state_dict()}

    # -- the step ------------------------------------------------------------------------------------------------------
    def prepare(self, host: Any, batch: Any, ctx: StepContext) -> Any:
        """Keep classes and groups, and hand the host the batch that it knows."""
        # a validation step may call the training step
        if ctx.stage == "fit" and ctx.trainer.training:
            self._known = self.batch_spec.targets_of(batch), self.groups_of(batch)
            if ctx.batch_idx == 0:
                self._check_groups(self._known[1])
        return super().prepare(host, batch, ctx)

    def _check_groups(self, groups: Tensor) -> None:
        least, most = int(groups.min()), int(groups.max())
        limit = 2 if self.overlapping else self.num_groups
        if not 0 <= least <= most < limit:
            raise ValueError(
                f"Expected the sensitive attribute to be in [0, {limit}), but got values from {least} to {most}. Pass"
                " `num_groups=...`."
            )

    def loss(self, host: Any, step: Callable[[Any], Tensor], batch: Any, ctx: StepContext) -> Tensor:
        """The host's loss; what the network puts out on the way is kept."""
        with captured_outputs(self.network_of(host)) as outputs:
            loss = step(batch)
        if not ctx.trainer.training:
            return loss
        if not outputs:
            raise not_called(self, host, "`training_step`")
        # of several calls, such as those of an attack, the last is the step's own
        self._logits = logits_of(outputs[-1])
        return loss

    def trained(self, trainer: Any) -> list[Tensor]:
        """What is trained."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Begin with the gradients of a step."""
        self._sums, self._played = None, []

    def _backward(self, host: Any, call: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        trainer, adversary, logits, known = host.trainer, self.adversary, self._logits, self._known
        assert adversary is not None  # noqa: S101  (begin)
        assert logits is not None  # noqa: S101  (loss)
        assert known is not None  # noqa: S101  (prepare)
        parameters = self.trained(trainer)
        hidden = adversary.loss(_wide(logits), *known) / trainer.accumulate_grad_batches
        if not hidden.requires_grad:
            raise MisconfigurationException(
                f"{type(self).__name__} finds no way from what is trained to the outputs of the"
                f" {type(self.network_of(host)).__name__}: the step evaluates it without a graph."
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            # the host's loss comes scaled: what is combined must be on one scale, and is unscaled together
            hidden = scaler.scale(hidden)
        utility = _gradients(loss, parameters, retain_graph=True)
        opposing = _gradients(hidden, parameters)
        if self._sums is None:
            self._sums = utility, opposing
        else:
            for total, new in zip([*self._sums[0], *self._sums[1]], [*utility, *opposing], strict=True):
                total += new
        self._played.append((logits.detach(), *known))
        self._logits = None
        self._write(parameters, *self._sums)

    @torch.no_grad()
    def _write(self, parameters: list[Tensor], utility: list[Tensor], opposing: list[Tensor]) -> None:
        """The combined gradient of all micro-batches so far, in ``.grad``."""
        if world_size() > 1:
            # the projection is not linear: means first
            count, sizes = len(parameters), [each.numel() for each in (*utility, *opposing)]
            whole = torch.cat([each.flatten() for each in (*utility, *opposing)])
            sum_over_ranks_([whole])
            means = [
                part.view_as(like) / world_size()
                for part, like in zip(whole.split(sizes), [*utility, *opposing], strict=True)
            ]
            utility, opposing = means[:count], means[count:]
        combined = conflict_free_gradient(utility, opposing, self.lmbda, self.project)
        for parameter, gradient in zip(parameters, combined, strict=True):
            parameter.grad = gradient.to(parameter.dtype)

    # -- the adversary's step ------------------------------------------------------------------------------------------
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember how many steps were taken."""
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the adversary take its step where the host's optimizer has taken one."""
        adversary, opponent, played = self.adversary, self._opponent, self._played
        if trainer.global_step != self._steps and played and adversary is not None and opponent is not None:
            with opponent.training():
                losses = [adversary.loss(_wide(logits), *known) for logits, *known in played]
                loss = torch.stack(losses).mean()
                opponent.step(loss)
            pl_module.log(
                "trust/adversary_loss",
                loss.detach(),
                on_step=False,
                on_epoch=True,
                sync_dist=True,
                batch_size=sum(len(logits) for logits, *_ in played),
            )
            self._played = []
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _leave(self) -> None:
        self._clear()
        super()._leave()


class AdversarialDebiasing(TwoPlayers):
    r"""Trains the host's own weights to hide the group of a sample from an adversary.

    .. math:: g = g_u - (g_u^\top u) \, u - \lambda g_a, \qquad u = g_a / \lVert g_a \rVert_2

    for every weight tensor, with gradients :math:`g_u` of the host's loss and :math:`g_a` of the cross-entropy of a
    :class:`~lightning_trust.nn.FairnessAdversary` that reads the group from the network's output. From scratch this is
    AdvIn of the paper on Fairness Reprogramming, from a trained checkpoint
    (:class:`~lightning_trust.callbacks.LoadWeights`) AdvPost: what
    :class:`~lightning_trust.callbacks.FairnessReprogramming` is to be compared with.

    Measures and logs as :class:`~lightning_trust.callbacks.FairnessEvaluation` does, and ``trust/adversary_loss``,
    which comes near the entropy of the groups where the output does not tell them.

    Paper: Mitigating Unwanted Biases with Adversarial Learning (AIES 2018, arXiv:1801.07593).

    Args:
        criterion: ``"dp"``, demographic parity, or ``"eo"``, equalised odds.
        lmbda: Weight :math:`\lambda` of the adversary, at least 0.
        num_groups: Number of groups.
        num_classes: Number of classes; 1 for a binary classifier with one logit.
        hidden: Units of each hidden layer of the adversary.
        use_logits: Whether it is given the raw logits as well.
        overlapping: Whether a sample can be in several groups: the sensitive attribute is zeros and ones ``(N, G)``.
        adversary_lr: Learning rate of the adversary's Adam.
        adversary_weight_decay: Its weight decay.
        project: Whether what of :math:`g_u` lies along :math:`g_a` is taken out.
        sensitive: Place of the sensitive attribute in a batch.
        keep_sensitive: Whether the host's steps get the sensitive attribute as well.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of the adversary's weights; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range, the sensitive attribute of a batch is, or the network puts out
            no logits ``(N, num_classes)``; at the end of an evaluation whose data hold no sample of a group and class.
        MisconfigurationException: If a batch tells no sensitive attribute, or a step does not call the network.

    Example:
        >>> AdversarialDebiasing(criterion="eo", lmbda=0.5).lmbda
        0.5

    """

    claims: ClassVar[tuple[Claim, ...]] = ("gradient_source",)

    def __init__(
        self,
        criterion: FairnessCriterion = "dp",
        lmbda: float = 0.05,
        num_groups: int = 2,
        num_classes: int = 2,
        hidden: Sequence[int] = (512,),
        use_logits: bool = True,
        overlapping: bool = False,
        adversary_lr: float = 0.05,
        adversary_weight_decay: float = 2e-5,
        project: bool = True,
        sensitive: Key = 2,
        keep_sensitive: bool = False,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_spec, network, name, seed)
        self.watch(num_groups, num_classes, sensitive, keep_sensitive)
        self.play(criterion, lmbda, hidden, use_logits, overlapping, adversary_lr, adversary_weight_decay, project)


def _gradients(loss: Tensor, parameters: list[Tensor], retain_graph: bool = False) -> list[Tensor]:
    """Gradients of a loss, zeros where it does not depend on a parameter; a copy each, for autograd may share them."""
    found = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()
        for parameter, gradient in zip(parameters, found, strict=True)
    ]


def _wide(logits: Tensor) -> Tensor:
    """Float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
