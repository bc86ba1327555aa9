"""Saliency unlearning: random labels, and only the salient weights move."""

from __future__ import annotations

from typing import ClassVar, Literal

from lightning_trust.callbacks.unlearning.random_label import Mode, RandomLabel
from lightning_trust.callbacks.unlearning.weight_saliency import Loss, WeightSaliency
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.step import Claim


class SalUn(WeightSaliency, RandomLabel):
    r"""Saliency unlearning: :class:`RandomLabel` under the mask of :class:`WeightSaliency`.

    .. math::
        \min_{\Delta\theta} \mathbb{E}_{x \in D_f} \, \ell(f(x; \theta_u), y') +
        \alpha \, \mathbb{E}_{(x, y) \in D_r} \, \ell(f(x; \theta_u), y), \qquad
        \theta_u = m \odot (\theta_o + \Delta\theta) + (1 - m) \odot \theta_o

    Paper: SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification and
    Generation (ICLR 2024): 10 epochs, SGD with momentum 0.9, learning rate 0.013 for random 10 % of CIFAR-10 with
    ResNet-18.

    Args:
        ratio: Share of the weights that may move, in [0, 1]; 1 is :class:`RandomLabel`.
        mode: ``"mixed"``: rows of both sets shuffled together. ``"sequential"``: in every epoch first all batches to
            forget, then all batches to retain.
        exclude_true_label: Whether the random label is never the true one.
        alpha: Weight of the retain loss; other than 1 only in sequential mode.
        scope: Whether the share is taken over all weights or in each tensor.
        random: Whether the mask is drawn at random: the baseline of the same ratio.
        loss: Mean loss of a batch from outputs and targets, for the saliency; cross-entropy if None.
        mask: A mask file to be used in place of the saliency pass.
        num_classes: Number of classes; what the network puts out if None.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of the labels and of a random mask; the one of ``seed_everything`` if None.

    Raises:
        ValueError: As :class:`RandomLabel` and :class:`WeightSaliency`.
        MisconfigurationException: As :class:`RandomLabel`; if the run's data module is no ``ForgetSplit``.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_trust.datamodules import Digits, ForgetRandom, ForgetSplit
        >>> from lightning_trust.modules import ImageClassifier
        >>> split = ForgetSplit(Digits(), ForgetRandom(fraction=0.1))
        >>> quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = pl.Trainer(fast_dev_run=1, callbacks=[salun := SalUn()], **quiet)
        >>> trainer.fit(ImageClassifier("SmallCNN"), split)
        >>> round(salun.mask.density, 3)
        0.5

    """

    claims: ClassVar[tuple[Claim, ...]] = tuple(dict.fromkeys((*RandomLabel.claims, *WeightSaliency.claims)))

    def __init__(
        self,
        ratio: float = 0.5,
        mode: Mode = "mixed",
        exclude_true_label: bool = False,
        alpha: float = 1.0,
        scope: Literal["global", "layer"] = "global",
        random: bool = False,
        loss: Loss | None = None,
        mask: str | None = None,
        num_classes: int | None = None,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        RandomLabel.__init__(
            self,
            mode=mode,
            exclude_true_label=exclude_true_label,
            alpha=alpha,
            num_classes=num_classes,
            batch_spec=batch_spec,
            network=network,
            name=name,
            seed=seed,
        )
        self._set_saliency(ratio, scope, random, loss, mask)
