"""Adversarial training that also teaches the network to ignore what it does not look at."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_trust.attacks import FGSM, PGD, Attack
from lightning_trust.attacks.preparation import prepared
from lightning_trust.callbacks.adversarial.adversarial_training import AdversarialTraining
from lightning_trust.callbacks.adversarial.objectives import AdversarialStep, Objective, at_least_zero
from lightning_trust.core.batch import BatchSpec
from lightning_trust.functional.adversarial.losses import kl_divergence
from lightning_trust.functional.adversarial.saliency import (
    Fill,
    Saliency,
    bernoulli_kl,
    feature_dimensions,
    masked_inputs,
    saliency_map,
)


class SaliencyGuided(Objective):
    r"""Own loss on adversarial inputs, and a divergence between inputs and their masked twins.

    The formula is that of :class:`~lightning_trust.callbacks.SaliencyGuidedAdversarialTraining`, which is the callback
    around it.

    Args:
        mask_fraction: Share of the features that are filled, in [0, 1).
        fill: What they are filled with.
        kl_weight: Weight of the divergence between an input and its masked twin.
        kl_on: Whether adversarial or clean inputs are masked.
        adv_kl_weight: Weight of the divergence between clean and adversarial inputs.
        clean_weight: Weight of the own loss on clean inputs.
        saliency: Which map ranks the features.
        multi_label: Whether targets are multi-hot.
        feature_dims: Number of last dimensions that hold features; two for images if None.

    Raises:
        ValueError: If an argument is out of its range.

    """

    def __init__(
        self,
        mask_fraction: float = 0.5,
        fill: Fill = "random",
        kl_weight: float = 1.0,
        kl_on: Literal["adv", "clean"] = "adv",
        adv_kl_weight: float = 0.0,
        clean_weight: float = 0.0,
        saliency: Saliency | Literal["random"] = "grad",
        multi_label: bool = False,
        feature_dims: int | None = None,
    ) -> None:
        if not 0.0 <= mask_fraction < 1.0:
            raise ValueError(f"Expected argument `mask_fraction` to be in [0, 1), but got {mask_fraction}.")
        for name, value, words in (
            ("fill", fill, ("random", "mean", "zero")),
            ("kl_on", kl_on, ("adv", "clean")),
            ("saliency", saliency, ("grad", "abs_grad", "integrated", "random")),
        ):
            if value not in words:
                raise ValueError(f"Expected argument `{name}` to be one of {list(words)}, but got {value!r}.")
        self.mask_fraction = mask_fraction
        self.fill = fill
        self.kl_weight = at_least_zero("kl_weight", kl_weight)
        self.kl_on = kl_on
        self.adv_kl_weight = at_least_zero("adv_kl_weight", adv_kl_weight)
        self.clean_weight = at_least_zero("clean_weight", clean_weight)
        self.saliency = saliency
        self.multi_label = multi_label
        self.feature_dims = feature_dims

    def default_attack(self) -> Attack:
        """Ten steps of PGD."""
        return PGD(eps=8 / 255, step_size=2 / 255, steps=10)

    def loss(self, step: AdversarialStep) -> Tensor:
        """All terms whose weight is not zero, each forward pass once."""
        masks = self.mask_fraction > 0.0 and self.kl_weight > 0.0
        divergence = kl_divergence if not self.multi_label else bernoulli_kl
        loss, adversarial = step.loss_and_logits("adv") if masks or self.adv_kl_weight else (step.loss("adv"), None)
        clean: Tensor | None = None
        if self.clean_weight:
            own, clean = step.loss_and_logits("clean")
            loss = loss + self.clean_weight * own
        if masks:
            logits = adversarial
            if self.kl_on == "clean":
                logits = clean = step.logits("clean") if clean is None else clean
            masked = step.network_logits(self._masked(step), "masked")
            assert logits is not None  # noqa: S101 (for mypy: they were asked for above)
            loss = loss + self.kl_weight * divergence(masked, logits).mean()
        if self.adv_kl_weight:
            clean = step.logits("clean") if clean is None else clean
            assert adversarial is not None  # noqa: S101 (as above)
            loss = loss + self.adv_kl_weight * divergence(adversarial, clean).mean()
        return loss

    def _masked(self, step: AdversarialStep) -> Tensor:
        inputs = step.adversarial if self.kl_on == "adv" else step.clean
        if self.saliency == "random":
            shape = inputs.shape[inputs.ndim - feature_dimensions(inputs, self.feature_dims) :]
            saliency = step.draws.stream("ranks").uniform(*shape)
        else:
            with prepared(step.network, step.attack.batch_norm):
                saliency = saliency_map(step.network, inputs, step.targets, self.saliency, self.feature_dims)
        noise = step.draws.stream("fill").uniform(*inputs.shape[1:]) if self.fill == "random" else None
        return masked_inputs(inputs, saliency, self.mask_fraction, self.fill, noise)[0]


class SaliencyGuidedAdversarialTraining(AdversarialTraining):
    r"""Train on adversarial inputs, and let predictions not depend on the features that matter least to them.

    .. math::
        \ell(f(x'), y) + \lambda_c \, \ell(f(x), y) + \lambda_s \, D_{KL}(p(z) \,\Vert\, p(\tilde z)) +
        \lambda_a \, D_{KL}(p(x) \,\Vert\, p(x'))

    where :math:`\tilde z` is :math:`z = x'` (or :math:`x`) with the given share of the features of lowest saliency
    :math:`S = \partial f_y(z) / \partial z`, averaged over channels, filled with noise. Adversarial inputs remove
    shortcuts weaker than the radius; the divergence keeps what is left to the salient parts. Without an attack it is
    saliency guided training, without a mask adversarial training, without both plain training.

    The signed map is the authors' default: it also ranks strongly negative features low; ``saliency="abs_grad"`` ranks
    by magnitude.

    Papers: Saliency Guided Adversarial Training for Learning Generalizable Features with Applications to Medical
    Imaging Classification System (arXiv:2209.04326); Improving Deep Learning Interpretability by Saliency Guided
    Training (NeurIPS 2021). How the first weights its terms is our reading: every term has its weight here.

    Args:
        attack: The attack; none if None: saliency guided training.
        mask_fraction: Share of the features that are filled, in [0, 1).
        fill: ``"random"`` (between the sample's smallest and largest value), ``"mean"`` or ``"zero"``.
        kl_weight: Weight :math:`\lambda_s`.
        kl_on: Whether adversarial (``"adv"``) or clean inputs are masked.
        adv_kl_weight: Weight :math:`\lambda_a`.
        clean_weight: Weight :math:`\lambda_c`.
        saliency: ``"grad"``, ``"abs_grad"`` or ``"integrated"``; ``"random"`` ranks at random: the baseline.
        loss: ``"ce"`` for classes, ``"bce"`` for multi-hot targets: what the attack maximises, and the kind of
            divergence.
        start_epoch: First epoch of all this; before it training is as it was.
        bn_update: Which passes move BatchNorm's running statistics: ``"both"`` counts all, masked ones included;
            ``"adv"`` and ``"clean"`` those on adversarial or clean inputs.
        feature_dims: Number of last dimensions that hold features; two for images if None.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of starts and fills; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If an argument is out of its range (at once); if targets do not fit ``loss``, or inputs are no
            images and ``feature_dims`` is None (in the first step).
        MisconfigurationException: If the logits cannot be had from the host's step.

    Warns:
        UserWarning: If the network's outputs look like probabilities.

    Example:
        >>> SaliencyGuidedAdversarialTraining(PGD(eps=4 / 255, step_size=1 / 255, steps=7)).objective.mask_fraction
        0.5

    """

    objective: SaliencyGuided

    def __init__(
        self,
        attack: Attack | None = None,
        mask_fraction: float = 0.5,
        fill: Fill = "random",
        kl_weight: float = 1.0,
        kl_on: Literal["adv", "clean"] = "adv",
        adv_kl_weight: float = 0.0,
        clean_weight: float = 0.0,
        saliency: Saliency | Literal["random"] = "grad",
        loss: Literal["ce", "bce"] = "ce",
        start_epoch: int = 0,
        bn_update: Literal["both", "adv", "clean"] = "both",
        feature_dims: int | None = None,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        if loss not in ("ce", "bce"):
            raise ValueError(f"Expected argument `loss` to be 'ce' or 'bce', but got {loss!r}.")
        objective = SaliencyGuided(
            mask_fraction=mask_fraction,
            fill=fill,
            kl_weight=kl_weight,
            kl_on=kl_on,
            adv_kl_weight=adv_kl_weight,
            clean_weight=clean_weight,
            saliency=saliency,
            multi_label=loss == "bce",
            feature_dims=feature_dims,
        )
        # without an attack the adversarial inputs are the clean ones
        chosen = attack or FGSM(eps=0.0)
        if loss == "bce" and chosen.loss == "ce":
            chosen = chosen.replaced(loss=summed_binary_cross_entropy)
        super().__init__(
            chosen,
            objective,
            start_epoch,
            None,
            bn_update,
            batch_spec=batch_spec,
            network=network,
            name=name,
            seed=seed,
        )
        self.bce = loss == "bce"

    def prepare(self, host: Any, batch: Any, ctx: Any) -> Any:
        """Put adversarial inputs in place of the clean ones; look at the targets of a first batch."""
        if not self._checked and ctx.trainer.current_epoch >= self.start_epoch:
            self._look(self.batch_spec.inputs_of(batch), self.batch_spec.targets_of(batch), self.network_of(host))
        return super().prepare(host, batch, ctx)

    def _look(self, inputs: Tensor, targets: Tensor, network: nn.Module) -> None:
        several = targets.ndim == 2
        if several != self.bce:
            wanted = "multi-hot of shape (N, K)" if self.bce else "classes of shape (N,)"
            raise ValueError(
                f"Expected targets to be {wanted}, because loss='{'bce' if self.bce else 'ce'}', but got shape"
                f" {tuple(targets.shape)}. Use loss='{'ce' if self.bce else 'bce'}'."
            )
        feature_dimensions(inputs, self.objective.feature_dims)
        with torch.no_grad(), prepared(network, self.attack.batch_norm):
            outputs = network(inputs)
        if outputs.ndim == 2 and not self.bce and bool((outputs >= 0.0).all()):
            sums = outputs.float().sum(dim=1)
            if torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
                _warn_probabilities(type(network).__name__)


def _warn_probabilities(network: str) -> None:
    rank_zero_warn(
        f"The outputs of {network} look like probabilities (rows sum to one), but saliency and divergences are of"
        " logits. Name the part that gives logits with `network`."
    )


def summed_binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each sample, summed over its labels, shape ``(N,)``."""
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").sum(dim=1)
