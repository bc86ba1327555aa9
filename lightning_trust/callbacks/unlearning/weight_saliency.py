"""Only the weights most responsible for what is to be forgotten may move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_trust.callbacks.unlearning.unlearner import find_split
from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.host import find_network, named_parameters
from lightning_trust.core.masks import ParameterMask, WeightHolding
from lightning_trust.core.passes import gradient_sum, timed_pass
from lightning_trust.core.step import Attachment, Claim, ConstraintPhase, GradientPhase, HostCallback

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Any, targets: Any) -> Tensor:
    """Mean cross-entropy of logits ``(N, K, ...)`` and labels ``(N, ...)``, or probabilities of the logits' shape.

    Raises:
        ValueError: If outputs and targets are something else.

    """
    logits = isinstance(outputs, Tensor) and outputs.ndim > 1 and outputs.is_floating_point()
    labels = isinstance(targets, Tensor) and (not targets.is_floating_point() or targets.shape == outputs.shape)
    if not logits or not labels:
        raise ValueError(
            "Expected the network to put out logits of shape (N, K), and the targets to be integer class labels,"
            " because the saliency is the gradient of their cross-entropy, but got"
            f" {_words(outputs)} and {_words(targets)}. Pass another `loss`, or name the part of the host that gives"
            " logits with `network`."
        )
    return F.cross_entropy(outputs, targets)


def _words(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class WeightSaliency(HostCallback):
    r"""Let only the most salient weights for the forget set move; hold all others where they are.

    With :math:`g = \nabla_\theta \sum_{(x, y) \in D_f} \ell(f(x; \theta_o), y)`, a signed sum over the rows to be
    forgotten in eval mode, the mask :math:`m` keeps the :math:`\lfloor \rho n \rfloor` of :math:`n` weights with the
    largest :math:`|g|`, and every step gives

    .. math:: \theta_u = m \odot (\theta_o + \Delta\theta) + (1 - m) \odot \theta_o .

    It combines with every unlearning callback; with :class:`RandomLabel` it is :class:`SalUn`.

    Paper: SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification and
    Generation (ICLR 2024); :math:`\rho = 0.5` puts the threshold at the median.

    Args:
        ratio: Share :math:`\rho` of the weights that may move, in [0, 1].
        scope: Whether the share is taken over all weights or in each tensor.
        random: Whether to draw the mask at random: the baseline of the same ratio.
        loss: Mean loss of a batch from the network's outputs and the targets; cross-entropy if None.
        mask: A mask file that :meth:`ParameterMask.save` wrote, to be used in place of a pass.
        batch_spec: Where inputs and targets sit in a batch.
        network: Name of the host's network; found by itself if None.
        name: Tells two callbacks of this class apart.
        seed: Seed of a random mask; the one of ``seed_everything`` if None.

    Raises:
        ValueError: If ``ratio`` is outside [0, 1] or ``scope`` is another word (at once); if the saliency is zero
            everywhere or not finite, the network puts out no logits and no ``loss`` is given, or the mask file is
            damaged or of another network (when the fit starts).
        MisconfigurationException: If a mask file and ``random`` are given both; if the run's data module is no
            ``ForgetSplit``.

    Example:
        >>> WeightSaliency(ratio=0.5).ratio
        0.5

    """

    claims: ClassVar[tuple[Claim, ...]] = ("weights", "gradient_edit")

    def __init__(
        self,
        ratio: float = 0.5,
        scope: Literal["global", "layer"] = "global",
        random: bool = False,
        loss: Loss | None = None,
        mask: str | None = None,
        batch_spec: BatchSpec | None = None,
        network: str | None = None,
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(name=name, seed=seed)
        self.batch_spec = batch_spec or BatchSpec()
        self.network = network
        self._set_saliency(ratio, scope, random, loss, mask)

    def _set_saliency(
        self, ratio: float, scope: Literal["global", "layer"], random: bool, loss: Loss | None, mask: str | None
    ) -> None:
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"Expected argument `ratio` to be a share of movable weights in [0, 1], but got {ratio}.")
        if scope not in ("global", "layer"):
            raise ValueError(f"Expected argument `scope` to be 'global' or 'layer', but got {scope!r}.")
        self.ratio = ratio
        self.scope = scope
        self.random_mask = random
        if random and mask is not None:
            raise MisconfigurationException(
                f"{type(self).__name__}(random=True, mask='{mask}') has two masks. Give one of the two arguments."
            )
        self.saliency_loss: Loss = loss or cross_entropy
        self.mask_file = mask
        self.mask: ParameterMask | None = None
        self._holding: WeightHolding | None = None

    # -- the mask ------------------------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Register the mask with the order of a step."""
        super().attach(trainer, host, attachment)
        self.mask = self._holding = None
        if not self.random_mask and self.mask_file is None:
            find_split(trainer, type(self).__name__)
        attachment.edit_gradients(self, GradientPhase.PROJECT, self._hold_gradients)
        attachment.constrain(self, ConstraintPhase.HOLD, self._hold_weights)

    def begin(self, trainer: Any, host: Any) -> None:
        """Make the mask, and hold the rest at the weights as they are now."""
        super().begin(trainer, host)
        if self.mask_file is not None:
            mask = ParameterMask.load(self.mask_file)
            mask.check(host, f"mask of {self.mask_file}")
            absent = [name for name in self._trainable(host) if name not in mask]
            if absent:
                raise ValueError(
                    f"Expected the mask of {self.mask_file} to name every trained parameter of {type(host).__name__},"
                    f" but got none for {len(absent)}: {', '.join(absent[:4])}{', ...' if len(absent) > 4 else ''}."
                )
        else:
            scores = self.saliency(trainer, host)
            with timed_pass(host):
                mask = self._mask(scores)
            del scores
        self._use(mask, WeightHolding(mask, host))

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Take mask and held weights from the checkpoint."""
        mask = ParameterMask.from_state_dict(state["mask"])
        mask.check(host, "mask of the checkpoint")
        self._use(mask, WeightHolding.from_state_dict(mask, host, state["held"]))

    def saliency(self, trainer: Any, host: Any) -> dict[str, Tensor]:
        """Saliency of every weight that takes a gradient, equal on all ranks.

        Args:
            trainer: The Trainer, whose data module tells what is to be forgotten.
            host: The host.

        """
        parameters = self._trainable(host)
        if self.random_mask:
            generator = self.random.shared("saliency")
            return {name: torch.rand(value.shape, generator=generator) for name, value in parameters.items()}
        split = find_split(trainer, type(self).__name__)
        sums = gradient_sum(
            trainer,
            host,
            find_network(host, self.network),
            split.part("forget", shard=True),
            self.saliency_loss,
            parameters,
            self.batch_spec,
        )
        return {name: score.abs_() for name, score in sums.items()}

    @staticmethod
    def _trainable(host: nn.Module) -> dict[str, nn.Parameter]:
        return {name: value for name, value in named_parameters(host).items() if value.requires_grad}

    def _mask(self, scores: dict[str, Tensor]) -> ParameterMask:
        dead = [name for name, score in scores.items() if not bool(torch.isfinite(score).all())]
        if dead:
            raise ValueError(
                f"Expected the gradient of the loss on the forget set to be finite, because {type(self).__name__} ranks"
                f" the weights by it, but got NaN or infinite values in {len(dead)} parameter(s): {', '.join(dead[:4])}"
                f"{', ...' if len(dead) > 4 else ''}. Is the loaded model sound?"
            )
        if not any(bool(score.any()) for score in scores.values()):
            raise ValueError(
                "Expected the gradient of the loss on the forget set to have an entry other than zero, but got none:"
                f" {type(self).__name__} cannot tell salient weights. Is the loss constant, or the network frozen?"
            )
        if self.scope == "global":
            return ParameterMask.from_scores(scores, int(self.ratio * sum(score.numel() for score in scores.values())))
        masks: dict[str, Tensor] = {}
        for name, score in scores.items():
            masks.update(ParameterMask.from_scores({name: score}, int(self.ratio * score.numel())))
        return ParameterMask(masks)

    def _use(self, mask: ParameterMask, holding: WeightHolding) -> None:
        self.mask = mask
        self._holding = holding

    def _hold_weights(self, optimizer: Any) -> None:
        if self._holding is not None:
            self._holding.weights()

    def _hold_gradients(self, optimizer: Any) -> None:
        if self._holding is not None:
            self._holding.gradients()

    def save_mask(self, path: str) -> None:
        """Write the mask to a file that the argument ``mask`` takes.

        Raises:
            RuntimeError: If no run has made a mask yet.

        """
        if self.mask is None:
            raise RuntimeError("Expected a run to have made a mask before it is saved, but none has.")
        self.mask.save(path)

    def state(self) -> dict[str, Any]:
        """The mask and the held weights."""
        state = super().state()
        if self.mask is not None and self._holding is not None:
            state.update(mask=self.mask.state_dict(), held=self._holding.state_dict())
        return state
