"""A frozen classifier made fairer by a trigger in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_trust.callbacks.prompting.adversarial_debiasing import TwoPlayers
from lightning_trust.core.batch import BatchSpec, Key
from lightning_trust.core.learning_rates import LearningRates
from lightning_trust.core.step import Attachment, Claim
from lightning_trust.core.wrapping import Surround, SurroundingCallback
from lightning_trust.nn import TextTrigger, VisualPrompt
from lightning_trust.nn.prompting.fairness_adversary import FairnessCriterion


class FairnessReprogramming(SurroundingCallback, TwoPlayers):
    r"""Makes a trained, frozen classifier fairer without touching its weights: one learned trigger for all inputs.

    .. math:: \min_\theta \; \ell(y, f(m(x; \theta)))
        - \lambda \min_\phi \mathrm{CE}\big(z, d(f(m(x; \theta)), [y]; \phi)\big)

    The trigger :math:`m` (a frame, a patch, words, a mask) is optimised against an adversary :math:`d` that reads the
    sensitive attribute :math:`z` from the output (``criterion="dp"``), or from output and class (``"eo"``). With
    gradients :math:`g_u` of the host's loss and :math:`g_a` of the adversary's, the trigger is moved along

    .. math:: g = g_u - (g_u^\top u) \, u - \lambda g_a, \qquad u = g_a / \lVert g_a \rVert_2

    for each of its tensors, both averaged over micro-batches and ranks first. The adversary takes a step of its own
    after each. All that the host holds is frozen and in eval mode, BatchNorm statistics included; its loss, logs and
    metrics are its own. Its steps get batches ``(x, y)`` of data that give ``(x, y, z)``.

    Logs what :class:`~lightning_trust.callbacks.FairnessEvaluation` logs in validation and test: choose a checkpoint
    with ``ModelCheckpoint(monitor="trust/worst_group_acc", mode="max")``, as the paper does. Logs
    ``trust/adversary_loss``, which comes near the entropy of the groups where the output does not tell them.

    A checkpoint holds the host under its own keys, and the trigger and the adversary as this callback's state. For use
    without a Trainer :class:`~lightning_trust.callbacks.SavePrompt` writes a trigger that is not for text.

    Paper: Fairness Reprogramming (NeurIPS 2022).

    Args:
        trigger: :class:`~lightning_trust.nn.BorderTrigger`, :class:`~lightning_trust.nn.PatchTrigger`,
            :class:`~lightning_trust.nn.ConcatTrigger`, :class:`~lightning_trust.nn.SoftTextTrigger`,
            :class:`~lightning_trust.nn.HardTextTrigger`, or any module that maps inputs to inputs, such as
            :class:`~lightning_trust.nn.PadPrompt`. One for text without an embedding gets that of the network, which
            must be a model of transformers that takes ``inputs_embeds``.
        criterion: ``"dp"``, demographic parity, or ``"eo"``, equalised odds.
        lmbda: Weight :math:`\lambda` of the adversary, at least 0; the paper's published runs have 0.05 for images, and
            0.1 to 1200 for text.
        num_groups: Number of groups.
        num_classes: Number of classes; 1 for a binary classifier with one logit.
        hidden: Units of each hidden layer of the adversary; the paper has 128 twice for text.
        use_logits: Whether it is given the raw logits as well.
        overlapping: Whether a sample can be in several groups: the sensitive attribute is zeros and ones ``(N, G)``.
        optimizer: Called with what is trained, gives the optimizer; the paper's for images by default. None takes the
            host's optimizers and schedules.
        schedule: Learning rate of ``optimizer`` over the run: ``"cosine"``, ``"cyclic"``, ``"constant"``, or a schedule
            of core.schedules, a factor at the epochs gone by; the paper divides by ten after 0.8 and 0.9 of the
            epochs: ``Steps([1.0, 0.1, 0.01], [16, 18])`` for 20.
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
        MisconfigurationException: If a batch tells no sensitive attribute, a step does not call the network, or the
            network takes no embeddings and the trigger is for text.

    Example:
        >>> from lightning_trust.nn import BorderTrigger
        >>> fair = FairnessReprogramming(BorderTrigger(image_size=224, border=20), criterion="eo")
        >>> sum(parameter.numel() for parameter in fair.part.parameters())
        48960

    """

    claims: ClassVar[tuple[Claim, ...]] = ("network", "gradient_source")

    def __init__(
        self,
        trigger: nn.Module,
        criterion: FairnessCriterion = "dp",
        lmbda: float = 0.05,
        num_groups: int = 2,
        num_classes: int = 2,
        hidden: Sequence[int] = (512,),
        use_logits: bool = True,
        overlapping: bool = False,
        optimizer: OptimizerCallable | None = lambda params: torch.optim.Adam(params, lr=1e-4, weight_decay=2e-5),
        schedule: LearningRates = "constant",
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
        part = trigger if isinstance(trigger, Surround) else VisualPrompt(trigger)
        SurroundingCallback.__init__(self, part, network, optimizer, schedule, name, seed)
        self.batch_spec = batch_spec or BatchSpec()
        self.watch(num_groups, num_classes, sensitive, keep_sensitive)
        self.play(criterion, lmbda, hidden, use_logits, overlapping, adversary_lr, adversary_weight_decay, project)

    @property
    def trigger(self) -> nn.Module:
        """The trigger."""
        return self.part.prompt if isinstance(self.part, VisualPrompt) else self.part

    # -- both bases have their say -------------------------------------------------------------------------------------
    def attach(self, trainer: Any, host: Any, attachment: Attachment) -> None:
        """Put the trigger before the network, and take the place of the backward pass."""
        SurroundingCallback.attach(self, trainer, host, attachment)
        TwoPlayers.attach(self, trainer, host, attachment)

    def begin(self, trainer: Any, host: Any) -> None:
        """Make the adversary."""
        TwoPlayers.begin(self, trainer, host)

    def resume(self, trainer: Any, host: Any, state: dict[str, Any]) -> None:
        """Go on with the checkpoint's trigger and adversary."""
        SurroundingCallback.resume(self, trainer, host, state)
        TwoPlayers.resume(self, trainer, host, state)

    def state(self) -> dict[str, Any]:
        """The trigger, the adversary and its optimizer."""
        return {**SurroundingCallback.state(self), **TwoPlayers.state(self)}

    def trained(self, trainer: Any) -> list[Tensor]:
        """The trigger's parameters."""
        return [parameter for parameter in self.part.parameters() if parameter.requires_grad]

    # -- text ----------------------------------------------------------------------------------------------------------
    def check_network(self, host: nn.Module, network: nn.Module) -> None:
        """Give a trigger for text the network's embedding, and the arguments of its calls."""
        super().check_network(host, network)
        part, attachment = self.part, self.attachment
        if not isinstance(part, TextTrigger) or attachment is None:
            return
        config = getattr(network, "config", None)
        if not part.bound:
            if not hasattr(network, "get_input_embeddings"):
                raise MisconfigurationException(
                    f"{type(part).__name__} looks for the embedding of words in the network, but a"
                    f" {type(network).__name__} has no `get_input_embeddings`, as models of transformers do. Pass"
                    " `embedding=...` to the trigger."
                )
            part.bind(network.get_input_embeddings(), getattr(config, "max_position_embeddings", None))  # type: ignore[operator]
        if network is host:
            attachment.wrap(host, "forward", self._with_trigger, order=-1)
        else:
            # it joins before the part does: hooks run in order
            handle = network.register_forward_pre_hook(_Rewrite(part), with_kwargs=True)
            attachment.undo.callback(handle.remove)

    def _with_trigger(self, _host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self.part, TextTrigger)  # noqa: S101  (check_network)
        return call(**_rewritten(self.part, args, kwargs))


class _Rewrite:
    """A hook that gives a model a trigger's embeddings in place of words; it is copied with the trigger."""

    def __init__(self, part: TextTrigger) -> None:
        self.part = part

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (), _rewritten(self.part, args, kwargs)


def _rewritten(part: TextTrigger, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
    if len(args) > 2 or not isinstance(given.get("input_ids"), Tensor):
        raise MisconfigurationException(
            f"{type(part).__name__} is for models that are called with `input_ids`, and `attention_mask`, but got"
            f" {len(args)} arguments and the keywords {list(kwargs)}. Call `model(input_ids=..., attention_mask=...)`."
        )
    return part(**given)
