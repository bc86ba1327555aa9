"""Adversarial training of an unchanged module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.attacks import Attack
from lightning_trust.attacks.attack import UNIT_BOX
from lightning_trust.callbacks.adversarial.objectives import (
    AdversarialStep,
    BatchNormUpdate,
    Crafting,
    Objective,
    ObjectiveName,
    create_objective,
)
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.schedules import Schedule
from lightning_trust.core.space import InputSpace
from lightning_trust.core.step import Claim, StepContext, StepTransform


class AdversarialTraining(StepTransform):
    r"""Train on adversarial inputs, crafted anew in every step against the network as it is.

    .. math:: \min_\theta \mathbb{E}_{(x, y)} \max_{\lVert \delta \rVert \le \epsilon} \ell(f(x + \delta; \theta), y)

    The attack runs on the bare network in eval mode, without gradients of parameters, in the precision of the run; the
    objective makes one loss of clean and adversarial inputs, out of the host's own wherever its paper does. Random
    starts are drawn for the global batch, so that two ranks attack as one with the whole batch would.

    Papers: Towards Deep Learning Models Resistant to Adversarial Attacks (ICLR 2018) and those of the objectives;
    Distributed Adversarial Training to Robustify Deep Neural Networks at Scale (UAI 2022).

    Args:
        attack: The attack; that of the objective's paper if None.
        objective: ``"standard"``, ``"clean_and_adversarial"``, ``"fast"``, ``"trades"``, ``"mart"``, ``"fast_bat"`` or
            ``"grad_align"``, or an object such as ``TRADES(beta=1.0)``.
        start_epoch: First epoch with adversarial inputs; before it training is as it was.
        eps_schedule: The radius over the epochs, in raw units, in place of the attack's; leave the attack's
            ``step_size`` at None, so that it follows.
        bn_update: Which forward passes of training move BatchNorm's running statistics, where an objective has both
            clean and adversarial ones: ``"both"``, ``"adv"`` or ``"clean"``.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of the random starts; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range (at once); if inputs lie outside the box or targets are no
            classes (in the first step).
        MisconfigurationException: If an objective that uses logits cannot get them from the host's step, or a schedule
            is for the radius of an attack that has none.
        RuntimeError: If an attack gives values that are not finite (at the end of the epoch).

    Example:
        >>> from lightning_trust.attacks import PGD
        >>> AdversarialTraining(PGD(eps=0.1, steps=5), objective="trades").objective
        TRADES(beta=6.0)

    """

    claims: ClassVar[tuple[Claim, ...]] = ("inputs",)

    def __init__(
        self,
        attack: Attack | None = None,
        objective: Objective | ObjectiveName = "standard",
        start_epoch: int = 0,
        eps_schedule: Schedule | None = None,
        bn_update: BatchNormUpdate = "both",
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_spec=batch_spec, network=network, name=name, seed=seed)
        if start_epoch < 0:
            raise ValueError(f"Expected argument `start_epoch` to be at least 0, but got {start_epoch}.")
        if bn_update not in ("both", "adv", "clean"):
            raise ValueError(f"Expected argument `bn_update` to be 'both', 'adv' or 'clean', but got {bn_update!r}.")
        self.objective = create_objective(objective)
        self.replaces_loss = self.objective.replaces_loss
        self.attack = (attack or self.objective.default_attack()).replaced(**self.objective.attack_arguments)
        self.start_epoch = start_epoch
        self.eps_schedule = eps_schedule
        self.bn_update: BatchNormUpdate = bn_update
        self._space = UNIT_BOX
        self._checked = False
        self._clean: Any = None
        self._finite: Tensor | None = None

    @property
    def changes_loss(self) -> bool:
        """Whether the objective makes a loss of its own."""
        return self.objective.changes_loss

    @property
    def all_claims(self) -> tuple[Claim, ...]:
        """What this callback claims, which depends on the objective."""
        return (*super().all_claims, "loss") if self.changes_loss else super().all_claims

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the budget against the data, and join the host's chain."""
        if stage == "fit":
            if self.eps_schedule is not None and self.attack.eps is None:
                raise MisconfigurationException(
                    f"Argument `eps_schedule` sets the radius `eps` of the attack, but {type(self.attack).__name__} has"
                    " none. Leave the schedule out, or take an attack with one radius, such as PGD."
                )
            self._space = input_space(self.attack, trainer)
            self.attack.check_budget(self._space)
            self._checked, self._finite = False, None
        super().setup(trainer, pl_module, stage)

    def prepare(self, host: Any, batch: Any, ctx: StepContext) -> Any:
        """Put adversarial inputs in place of the clean ones."""
        self._clean = None
        if ctx.trainer.current_epoch < self.start_epoch:
            return batch
        inputs = self.batch_spec.inputs_of(batch)
        crafting = Crafting(
            attack=self._current_attack(ctx),
            network=self.network_of(host),
            inputs=inputs,
            targets=self.batch_spec.targets_of(batch),
            space=self._space,
            draws=self._draws(inputs, ctx),
            check=not self._checked,
        )
        adversarial = self._crafted(crafting)
        self._checked = True
        self._clean = inputs
        return self.batch_spec.replace(batch, inputs=adversarial)

    def _crafted(self, crafting: Crafting) -> Tensor:
        """What the objective crafts; whether it is finite is looked at once an epoch: a look waits for the device."""
        adversarial = self.objective.craft(crafting)
        finite = crafting.finite(adversarial)
        self._finite = finite if self._finite is None else self._finite & finite
        return adversarial

    def loss(self, host: Any, step: Callable[[Any], Tensor], batch: Any, ctx: StepContext) -> Tensor:
        """The objective's loss."""
        if self._clean is None:
            return step(batch)
        adversarial = self.batch_spec.inputs_of(batch)
        return self.objective.loss(
            AdversarialStep(
                host=host,
                network=self.network_of(host),
                attack=self._current_attack(ctx),
                space=self._space,
                clean=self._clean,
                adversarial=adversarial,
                targets=self.batch_spec.targets_of(batch),
                evaluate=lambda inputs: step(self.batch_spec.replace(batch, inputs=inputs)),
                draws=self._draws(self._clean, ctx),
                bn_update=self.bn_update,
            )
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of the clean inputs."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._clean = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Refuse to go on where an attack gave values that are not finite."""
        finite, self._finite = self._finite, None
        if finite is not None and not bool(finite):
            raise RuntimeError(
                f"{type(self.attack).__name__} got NaN or infinite gradients in epoch {trainer.current_epoch}, so its"
                " adversarial inputs are not what they should be. Lower the learning rate, or use"
                " precision='bf16-mixed' or '32-true'."
            )

    def _draws(self, inputs: Tensor, ctx: StepContext) -> Any:
        return self.random.samples(len(inputs), "attack", ctx.total_batch_idx, device=inputs.device)

    def _current_attack(self, ctx: StepContext) -> Attack:
        if self.eps_schedule is None:
            return self.attack
        trainer = ctx.trainer
        progress = trainer.current_epoch + ctx.batch_idx / max(1, trainer.num_training_batches)
        return self.attack.replaced(eps=self.eps_schedule.value_at(progress))


def input_space(attack: Attack | None, trainer: Any) -> InputSpace:
    """The space of a run's inputs: that of the attack, else that of the data, else images in [0, 1]."""
    return attack.space if attack is not None and attack.space is not None else data_space(trainer)


def data_space(trainer: Any) -> InputSpace:
    """What the data module says of its inputs; images in [0, 1] where it says nothing.

    Raises:
        MisconfigurationException: If the data module has an ``input_space`` that is none.

    """
    space = getattr(trainer.datamodule, "input_space", None)
    if space is None:
        return UNIT_BOX
    if not isinstance(space, InputSpace):
        raise MisconfigurationException(
            f"Expected `{type(trainer.datamodule).__name__}.input_space` to be an InputSpace, but got"
            f" {type(space).__name__}."
        )
    return space
