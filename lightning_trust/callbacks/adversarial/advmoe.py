"""Router and experts of a mixture-of-experts network, made robust in turn."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_trust.attacks import PGD
from lightning_trust.attacks.preparation import attack_mode
from lightning_trust.callbacks.adversarial.adversarial_training import AdversarialTraining
from lightning_trust.callbacks.adversarial.objectives import TRADES, AdversarialStep, Crafting, at_least_zero
from lightning_trust.core.auxiliary import AuxiliaryOptimizer
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import mean_over_ranks
from lightning_trust.core.modes import eval_mode, frozen_parameters, untouched_batchnorm
from lightning_trust.core.schedules import Schedule
from lightning_trust.core.step import Attachment, BuildPhase, StepContext
from lightning_trust.functional.adversarial.losses import kl_divergence
from lightning_trust.functional.adversarial.router_losses import balance_loss, class_mod_router_loss, expert_shares
from lightning_trust.functional.adversarial.trades import trades_kl
from lightning_trust.nn.adversarial.moe import JointOutputs, MoENetwork

RouterObjective = Literal["trades", "class_mod"]
#: share of the images at one expert from which on there is no mixture
_ALL = 0.99


class AdvMoE(AdversarialTraining):
    r"""Adversarial training of a network of experts: pathways and router take a step each, in turn.

    .. math::
        x' &= \arg\max_{\lVert \delta \rVert_\infty \le \epsilon} D_{KL}(p(x) \,\Vert\, p(x + \delta))
        + w \, D_{KL}(s(x) \,\Vert\, s(x + \delta)) \\
        \theta &: \; \ell(f(x), y) + \beta \, D_{KL}(p(x) \,\Vert\, p(x')) \\
        \psi &: \; \mathrm{CE}(f(x), y) + \beta \, D_{KL}(p(x) \,\Vert\, p(x')) \quad \text{(trades), or} \quad
        \alpha \, \mathrm{CE}(s(x), y \bmod E) + \beta \, D_{KL}(s(x) \,\Vert\, s(x')) \quad \text{(class\_mod)}

    with predictions :math:`p` of the pathways :math:`\theta` and :math:`s` of the router :math:`\psi`. The network is a
    :class:`~lightning_trust.nn.MoENetwork`, converted before the run. The host's own optimizer and loss train the
    pathways with the router held; after each of its steps the router takes one on the same batch, with inputs attacked
    anew, by SGD of its own. The gradient reaches the router straight through its decision, for which all experts
    compute; BatchNorm statistics of the pathways do not move in this step. With accumulated gradients the router's
    step uses the last micro-batch. While the run lasts the router's parameters take no gradients from the host's loss.

    Logs ``trust/expert_share/<e>``, the share of images that go to an expert, and ``trust/router_agreement``, the share
    whose expert the attack does not change. With ``"trades"`` nothing keeps the router from sending all images to one
    expert: the straight-through gradient does not fade where one score leads, so that scores run apart. Watch the
    shares, and take ``"class_mod"`` where that happens, or a ``balance_weight`` with a ``router_lr`` of about 0.01:
    once scores are far apart, the balance, which looks at their softmax, has no hold on them.

    Paper: Robust Mixture-of-Expert Training for Convolutional Neural Networks (ICCV 2023). ``"trades"`` is the paper's
    formulation, ``"class_mod"`` what its public code does.

    Args:
        eps: Radius of the l-infinity ball in raw units.
        step_size: Size of a step of the attack.
        steps: Steps of the attack, which starts from 0.001 times a standard normal.
        beta: Weight of the divergence, at least 0.
        router_attack_weight: Weight :math:`w` of the router's part in the attack, at least 0.
        router_objective: ``"trades"`` or ``"class_mod"``.
        alpha: Weight of the router's cross-entropy in ``"class_mod"``, at least 0.
        balance_weight: Weight of :func:`~lightning_trust.functional.adversarial.balance_loss` in the router's step, at
            least 0.
        router_lr: Learning rate of the router, at least 0.
        router_momentum: Its momentum, in [0, 1).
        router_weight_decay: Its weight decay, at least 0.
        router_schedule: Factor of ``router_lr`` over the epochs; a cosine over the Trainer's ``max_epochs`` if None.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of the random starts; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range (at once); if targets are no classes, or fewer classes than
            experts under ``"class_mod"`` (in the first step).
        MisconfigurationException: If the network is no :class:`~lightning_trust.nn.MoENetwork`.
        RuntimeError: If an attack gives values that are not finite (at the end of the epoch).

    Warns:
        UserWarning: Once, at the end of an epoch in which one expert got all images.

    Example:
        >>> callback = AdvMoE(eps=0.1, step_size=0.05, router_objective="class_mod")
        >>> callback.attack.steps, callback.objective.beta, callback.alpha
        (2, 6.0, 6.0)

    """

    def __init__(
        self,
        eps: float = 8 / 255,
        step_size: float = 5 / 255,
        steps: int = 2,
        beta: float = 6.0,
        router_attack_weight: float = 1.0,
        router_objective: RouterObjective = "trades",
        alpha: float = 6.0,
        balance_weight: float = 0.0,
        router_lr: float = 0.1,
        router_momentum: float = 0.9,
        router_weight_decay: float = 5e-4,
        router_schedule: Schedule | None = None,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        if router_objective not in ("trades", "class_mod"):
            raise ValueError(
                f"Expected argument `router_objective` to be 'trades' or 'class_mod', but got {router_objective!r}."
            )
        if not 0.0 <= router_momentum < 1.0:
            raise ValueError(f"Expected argument `router_momentum` to be in [0, 1), but got {router_momentum}.")
        weight = at_least_zero("router_attack_weight", router_attack_weight)
        self.joint = _JointTRADES(beta, weight, class_mod=router_objective == "class_mod")
        attack = PGD(eps, step_size, steps, random_start="gaussian")
        super().__init__(attack, self.joint, batch_spec=batch_spec, network=network, name=name, seed=seed)
        self.router_objective: RouterObjective = router_objective
        self.alpha = at_least_zero("alpha", alpha)
        self.balance_weight = at_least_zero("balance_weight", balance_weight)
        self.router_lr = at_least_zero("router_lr", router_lr)
        self.router_momentum = router_momentum
        self.router_weight_decay = at_least_zero("router_weight_decay", router_weight_decay)
        self.router_schedule = router_schedule
        self._router: AuxiliaryOptimizer | None = None
        self._targets: Tensor | None = None
        self._key = 0
        self._steps = 0
        self._shares: Tensor | None = None
        self._router_steps = 0
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        # it holds the host's parameters, and is made anew in every fit
        return {**super().__getstate__(), "_router": None}

    # -- the run -------------------------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Keep the router from the host's optimizer and from DDP."""
        self._router, self._targets = None, None
        self._shares, self._router_steps, self._warned = None, 0, False
        attachment.when_built(self, host, BuildPhase.WRAP, partial(self._hold_router, attachment))

    def _hold_router(self, attachment: Attachment, host: nn.Module) -> None:
        held = frozen_parameters(list(self._moe(host).router.parameters()))
        for parameter in self._moe(host).router.parameters():
            # an optimizer moves what has a gradient, be it one of an earlier run
            parameter.grad = None
        attachment.undo.enter_context(held)

    def begin(self, trainer: Any, host: Any) -> None:
        """Make the router's optimizer."""
        self._router = AuxiliaryOptimizer(
            list(self._moe(host).router.parameters()),
            lambda parameters: torch.optim.SGD(
                parameters,
                lr=self.router_lr,
                momentum=self.router_momentum,
                weight_decay=self.router_weight_decay,
            ),
        )

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Make the router's optimizer and go on with it."""
        self.begin(trainer, host)
        if state and self._router is not None:
            self._router.load_state_dict(state["router"])

    def state(self) -> dict[str, Any]:
        """State of the router's optimizer."""
        return {} if self._router is None else {"router": self._router.state_dict()}

    def prepare(self, host: Any, batch: Any, ctx: StepContext) -> Any:
        """Put adversarial inputs in place of the clean ones."""
        self._targets, self._key = self.batch_spec.targets_of(batch), ctx.total_batch_idx
        inputs = self.batch_spec.inputs_of(batch)
        if self._targets.dtype != torch.int64 or self._targets.shape != inputs.shape[:1]:
            raise ValueError(
                f"Expected targets to be int64 classes of shape ({len(inputs)},), but got {self._targets.dtype} of"
                f" shape {tuple(self._targets.shape)}."
            )
        return super().prepare(host, batch, ctx)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember how many steps the pathways have taken."""
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the router take its step where the pathways have taken theirs."""
        if trainer.global_step != self._steps and self._router is not None and self._clean is not None:
            self._router_step(trainer, pl_module, self._router)
        self._targets = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so where one expert gets all."""
        super().on_train_epoch_end(trainer, pl_module)
        total, steps, self._shares, self._router_steps = self._shares, self._router_steps, None, 0
        if total is None or self._warned:
            return
        shares = (mean_over_ranks(total) / steps).tolist()
        if max(shares) >= _ALL:
            self._warned = True
            rank_zero_warn(
                f"In epoch {trainer.current_epoch} the router of AdvMoE sent {100 * max(shares):.1f} % of the images to"
                f" expert {shares.index(max(shares))}: the others learn nothing, and the network is as good as its one"
                " pathway. Take router_objective='class_mod', or a lower `router_lr` with `balance_weight` above 0."
            )

    # -- the router's step ---------------------------------------------------------------------------------------------
    def _router_step(self, trainer: Any, host: Any, router: AuxiliaryOptimizer) -> None:
        moe, inputs, targets = self._moe(host), self._clean, self._targets
        assert targets is not None  # noqa: S101  # prepare has set it with the inputs
        # float16 gradients would need a scaler of their own
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        precision = nullcontext() if scaled else trainer.precision_plugin.train_step_context()
        with precision:
            draws = self.random.samples(len(inputs), "router", self._key, device=inputs.device)
            adversarial = self._crafted(Crafting(self.attack, moe, inputs, targets, self._space, draws))
            with (
                router.training(),
                frozen_parameters(moe.network.parameters()),
                untouched_batchnorm(moe.network),
                moe.dispatching("mask"),
            ):
                loss, scores, moved = self._router_loss(moe, inputs, adversarial, targets)
                router.scale_lr(self._lr_factor(trainer))
                router.step(loss)
        self._log_routing(host, scores, moved)

    def _router_loss(
        self, moe: MoENetwork, inputs: Tensor, adversarial: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and the scores on clean and adversarial inputs."""
        if self.router_objective == "trades":
            logits, scores = moe.forward_with_scores(inputs)
            perturbed, moved = moe.forward_with_scores(adversarial)
            loss = F.cross_entropy(_wide(logits), targets)
            loss = loss + self.joint.beta * trades_kl(logits, perturbed)
        else:
            scores, moved = moe.route(inputs), moe.route(adversarial)
            loss = class_mod_router_loss(scores, moved, targets, self.alpha, self.joint.beta)
        if self.balance_weight:
            # the shares of the global batch, so that the mean of the ranks' losses is that of one rank
            loss = loss + self.balance_weight * balance_loss(scores, mean_over_ranks(expert_shares(scores)))
        return loss, scores.detach(), moved.detach()

    def _lr_factor(self, trainer: Any) -> float:
        if self.router_schedule is not None:
            return self.router_schedule.value_at(trainer.current_epoch)
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * trainer.current_epoch / epochs))

    def _log_routing(self, host: Any, scores: Tensor, moved: Tensor) -> None:
        agreement = (scores.argmax(dim=1) == moved.argmax(dim=1)).float().mean()
        shares = expert_shares(scores).detach()
        self._shares = shares if self._shares is None else self._shares + shares
        self._router_steps += 1
        values = {f"trust/expert_share/{expert}": share for expert, share in enumerate(shares)}
        host.log_dict(
            {**values, "trust/router_agreement": agreement},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(scores),
        )

    def _moe(self, host: nn.Module) -> MoENetwork:
        network = self.network_of(host)
        if not isinstance(network, MoENetwork):
            raise MisconfigurationException(
                f"AdvMoE needs a network of experts, but the network of {type(host).__name__} is a"
                f" {type(network).__name__}. Convert it before the run: `convert_to_moe(network)` of"
                " lightning_trust.nn, or name it with `network`."
            )
        return network


class _JointTRADES(TRADES):
    """TRADES on pathways that are attacked together with their router."""

    attack_arguments: ClassVar[dict[str, Any]] = {"random_start": "gaussian"}

    def __init__(self, beta: float, router_attack_weight: float, class_mod: bool) -> None:
        super().__init__(beta)
        self.router_attack_weight = router_attack_weight
        self.class_mod = class_mod

    def craft(self, crafting: Crafting) -> Tensor:
        """Inputs that move predictions and routing at once."""
        moe: Any = crafting.network
        joint, experts = JointOutputs(moe), moe.num_experts
        with attack_mode(moe), torch.no_grad():
            clean = joint(crafting.inputs)
        classes = clean.shape[1] - experts
        if self.class_mod and classes < experts:
            raise ValueError(
                f"Expected at least {experts} classes, one an expert, for router_objective='class_mod', but got"
                f" {classes}. Take router_objective='trades', or fewer experts."
            )
        attack = crafting.attack.replaced(loss=partial(_joint_divergence, experts, self.router_attack_weight))
        return crafting.found_by(attack, joint, clean)

    def loss(self, step: AdversarialStep) -> Tensor:
        """Loss of the pathways, with a router that decides as in evaluation."""
        router: Any = step.network.router
        with eval_mode(router):
            # statistics of BatchNorm move as in plain training where the divergence does not count
            return super().loss(step) if self.beta else step.loss("clean")


def _joint_divergence(experts: int, weight: float, outputs: Tensor, clean: Tensor) -> Tensor:
    """Divergence of the predictions plus that of the routing, one value a sample."""
    predictions = kl_divergence(outputs[:, :-experts], clean[:, :-experts])
    return predictions + weight * kl_divergence(outputs[:, -experts:], clean[:, -experts:])


def _wide(outputs: Tensor) -> Tensor:
    """Float32 at least."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
