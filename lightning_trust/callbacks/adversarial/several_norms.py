"""Adversarial training of one network against several norms: the mean of their losses, or one norm a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_trust.attacks import Attack
from lightning_trust.attacks.worst_of import check_attacks
from lightning_trust.callbacks.adversarial.adversarial_training import AdversarialTraining
from lightning_trust.callbacks.adversarial.objectives import AdversarialStep, Crafting, Objective
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import sum_over_ranks_
from lightning_trust.core.modes import eval_mode
from lightning_trust.core.step import StepContext


class AverageOf(Objective):
    r"""The mean of the host's own losses on what each of several attacks finds: the "avg" strategy.

    .. math:: \frac1A \sum_i \ell(f(x'_i), y)

    It brings its attacks: leave ``attack`` and ``eps_schedule`` of
    :class:`~lightning_trust.callbacks.AdversarialTraining` at None. A step costs as much as one with each attack.

    Paper: Adversarial Training and Robustness for Multiple Perturbations (NeurIPS 2019).

    Args:
        attacks: The attacks, such as PGD in several norms.

    Raises:
        ValueError: If there is no attack, one is targeted or has a ``space`` or ``batch_size`` of its own, or they
            differ in ``batch_norm``.

    """

    def __init__(self, attacks: Sequence[Attack]) -> None:
        check_attacks(attacks)
        self.attacks = list(attacks)
        self._found: list[Tensor] = []

    def __repr__(self) -> str:
        return f"AverageOf(attacks={self.attacks!r})"

    def default_attack(self) -> Attack:
        """The first one."""
        return self.attacks[0]

    def craft(self, crafting: Crafting) -> Tensor:
        """What the first attack finds; that of the others is kept for the loss."""
        if repr(crafting.attack) != repr(self.attacks[0]):
            raise MisconfigurationException(
                f"AverageOf brings its attacks, but got another one as well: {crafting.attack!r}. Leave `attack` and"
                " `eps_schedule` of AdversarialTraining at None."
            )
        self._found = [crafting.found_by(attack) for attack in self.attacks]
        return self._found[0]

    def loss(self, step: AdversarialStep) -> Tensor:
        """The mean."""
        found, self._found = self._found, []
        losses = [replace(step, adversarial=inputs).loss("adv") for inputs in found]
        return torch.stack(losses).mean()


class ExtremeNormTraining(AdversarialTraining):
    r"""E-AT: every batch is attacked in one norm, drawn the more often the worse the network resists it.

    .. math:: P(p) = \frac{e_p}{\sum_q e_q}

    with the robust error :math:`e_p` in training: that of all batches so far that met norm :math:`p`, on all ranks,
    which goes on with every batch. Until each norm was met all are as likely. The two extreme norms, linf and l1, are
    enough: what resists both resists those in between. It turns a network that is robust to one norm into one that is
    robust to several within a few epochs: start from one with :class:`~lightning_trust.callbacks.LoadWeights`.

    Paper: Adversarial Robustness against Multiple and Single lp-Threat Models via Quick Fine-Tuning of Robust
    Classifiers (ICML 2022).

    Args:
        attacks: The attacks.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of norms and random starts; the one of ``seed_everything`` if None.

    Attributes:
        errors: The robust errors by which the norm of the next batch is drawn.

    Raises:
        ValueError: If there is no attack, one is targeted or has a ``space`` or ``batch_size`` of its own, or they
            differ in ``batch_norm``.

    Example:
        >>> from lightning_trust.attacks import PGD
        >>> ExtremeNormTraining([PGD(eps=0.1), PGD(eps=12.0, norm="l1")]).errors
        [1.0, 1.0]

    """

    def __init__(
        self,
        attacks: Sequence[Attack],
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        check_attacks(attacks)
        super().__init__(attacks[0], batch_spec=batch_spec, network=network, name=name, seed=seed)
        self.attacks = list(attacks)
        self._norm = 0
        self._forget()

    def _forget(self) -> None:
        self.errors = [1.0] * len(self.attacks)
        #: misclassified samples and samples of each norm so far
        self._counts = [[0, 0] for _ in self.attacks]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the budgets against the data."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            for attack in self.attacks:
                attack.check_budget(self._space)

    def begin(self, trainer: Any, host: Any) -> None:
        """All norms are as likely."""
        self._forget()

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the errors."""
        self.errors, self._counts = list(state["errors"]), [list(counts) for counts in state["counts"]]

    def state(self) -> dict[str, Any]:
        """The errors, and what was counted."""
        return {"errors": list(self.errors), "counts": [list(counts) for counts in self._counts]}

    def prepare(self, host: Any, batch: Any, ctx: StepContext) -> Any:
        """Attack in the norm of this batch, and see how many samples resist."""
        self._norm = self._norm_of(ctx)
        batch = super().prepare(host, batch, ctx)
        network = self.network_of(host)
        with torch.no_grad(), eval_mode(network):
            outputs = network(self.batch_spec.inputs_of(batch))
        targets = self.batch_spec.targets_of(batch)
        met = torch.stack([(outputs.argmax(dim=1) != targets).sum(), torch.ones_like(targets).sum()])
        # the next norm is drawn alike on all ranks
        sum_over_ranks_([met])
        self._counts[self._norm] = [old + new for old, new in zip(self._counts[self._norm], met.tolist(), strict=True)]
        if all(seen for _, seen in self._counts):
            self.errors = [wrong / seen for wrong, seen in self._counts]
        return batch

    def _norm_of(self, ctx: StepContext) -> int:
        # the same on all ranks
        weights = torch.tensor(self.errors, dtype=torch.float64)
        if not bool(weights.any()):
            weights.fill_(1.0)
        generator = self.random.shared("norm", ctx.total_batch_idx)
        return int(torch.multinomial(weights, 1, generator=generator))

    def _current_attack(self, ctx: StepContext) -> Attack:
        return self.attacks[self._norm]
