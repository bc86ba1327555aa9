"""Training of a causal language model, whole or by an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_trust.core.hyperparameters import save_arguments
from lightning_trust.core.learning_rates import check_schedule, scheduled
from lightning_trust.core.schedules import Schedule
from lightning_trust.nn.language import LoRA, create_causal_network
from lightning_trust.nn.language.causal_network import Precision

Batch = Mapping[str, Tensor]
#: A label that does not count.
IGNORED = -100


class CausalLanguageModel(pl.LightningModule):
    r"""Next-token training of a causal language model of transformers: all of its weights, or an adapter's alone.

    .. math:: L = \frac{1}{|S|} \sum_{(b, t) \in S} -\log p_\theta(y_{b, t} \mid x_{b, <t})

    over the places :math:`S` of a batch whose label is not -100, the first of each row left out; in single precision
    whatever the network computes in. Where the last token of a row is the word of its class (see
    :class:`~lightning_trust.datamodules.PromptedText`) this is classification by a verbalizer, and the class of a row
    is the likeliest of the candidates.

    Logs ``train/loss`` per step, and ``val/loss``, ``val/perplexity``, ``test/loss``, ``test/perplexity`` per epoch,
    means over all labels; ``val/acc`` and ``test/acc`` (shares in [0, 1]) where batches have candidates. ``predict``
    gives the classes, int64 ``(B,)``, there, and otherwise the likeliest next token at every place, int64 ``(B, T)``.

    A checkpoint keeps the whole network under its own names, so that it resumes, and loads, exactly; the small file of
    an adapter is written by :class:`~lightning_trust.callbacks.SaveAdapter`.

    Shape:
        - Batch: a mapping of ``input_ids``, ``attention_mask`` and ``labels``, int64 ``(B, T)``, and perhaps
          ``candidates``, int64 ``(K,)``. Labels stand under the tokens that they are.
        - ``forward``: tokens and mask -> logits ``(B, T, V)``.

    Args:
        model: Name on the hub of Hugging Face, a folder, or a checkpoint (``.ckpt``) of this class without an adapter;
            its weights are loaded.
        config: In place of ``model``: what makes a network of random weights, ``model_type`` and the arguments of its
            configuration in transformers.
        lora: An adapter; all other weights are frozen then. None for none.
        dtype: What the weights are loaded in: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        gradient_checkpointing: Whether the backward pass computes activations anew rather than keeping them.
        optimizer: Called with the named parameters that require a gradient, gives the optimizer. By default AdamW with
            learning rate 1e-4.
        schedule: ``"cosine"``, ``"cyclic"`` or ``"constant"`` learning rate; or a schedule of core.schedules, whose
            value at the epochs gone by multiplies the learning rate.

    Attributes:
        network: The network; it holds all parameters.

    Raises:
        ModuleNotFoundError: If transformers, or peft, is missing; the error names the extra ``language``.
        ValueError: If an argument is out of its range.
        MisconfigurationException: If not exactly one of ``model`` and ``config`` is given, or the schedule needs a
            number of steps that the run does not have.

    Note:
        A checkpoint names the architecture, so that ``load_from_checkpoint`` needs neither the hub nor the folder that
        the network came from. It needs ``optimizer`` and a ``schedule`` that is no word again where training goes on;
        under LightningCLI it keeps all.

    Example:
        >>> import torch
        >>> config = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> model = CausalLanguageModel(config=config, lora=LoRA(r=2, target_modules=["c_attn"]))
        >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 9])
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        64

    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        lora: LoRA | None = None,
        dtype: Precision = "float32",
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        schedule: Schedule | Literal["cosine", "cyclic", "constant"] = "constant",
    ) -> None:
        super().__init__()
        check_schedule(schedule)
        # plain data, as it comes back from a checkpoint
        lora = LoRA(**lora) if isinstance(lora, Mapping) else lora
        save_arguments(self, ["optimizer", "lora", *([] if isinstance(schedule, str) else ["schedule"])])
        if "lora" not in self.hparams:
            self.save_hyperparameters({"lora": None if lora is None else asdict(lora)})
        self.network = create_causal_network(model, config, lora, dtype, gradient_checkpointing)
        self.schedule = schedule
        self._make_optimizer = optimizer
        # a loss that is no number stays one; "disable" forgets the weights
        self.val_loss, self.test_loss = MeanMetric(nan_strategy=math.nan), MeanMetric(nan_strategy=math.nan)
        self.val_acc, self.test_acc = MeanMetric(), MeanMetric()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens ``(B, T)`` -> logits ``(B, T, V)`` of the tokens that follow."""
        return self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        labels = batch["labels"][:, 1:]
        logits = self(batch["input_ids"], batch.get("attention_mask"))[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/acc``."""
        self._evaluate(batch, "val", self.val_loss, self.val_acc)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/acc``."""
        self._evaluate(batch, "test", self.test_loss, self.test_acc)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Classes ``(B,)`` where there are candidates, else the likeliest next tokens ``(B, T)``."""
        logits = self(batch["input_ids"], batch.get("attention_mask"))
        if "candidates" not in batch:
            return logits.argmax(dim=-1)
        return self._classes(logits[:, :-1], batch["labels"][:, 1:], batch["candidates"])[0]

    def _evaluate(self, batch: Batch, stage: str, losses: MeanMetric, accuracy: MeanMetric) -> None:
        labels = batch["labels"][:, 1:]
        logits = self(batch["input_ids"], batch.get("attention_mask"))[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        losses.update(each, (labels != IGNORED).to(each))
        rows = len(labels)
        self.log(f"{stage}/loss", losses, batch_size=rows)
        if "candidates" in batch:
            found, tokens = self._classes(logits, labels, batch["candidates"])
            accuracy.update((batch["candidates"][found] == tokens).float())
            self.log(f"{stage}/acc", accuracy, prog_bar=True, batch_size=rows)

    @staticmethod
    def _classes(logits: Tensor, labels: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest candidate of each row where its label stands, and that label."""
        place = (labels != IGNORED).int().argmax(dim=1)
        rows = torch.arange(len(labels), device=labels.device)
        return logits[rows, place][:, candidates].argmax(dim=1), labels[rows, place]

    def on_validation_epoch_start(self) -> None:
        """Make the measures anew: what `Trainer.validate` made in inference mode cannot be updated in a fit."""
        self.val_loss.reset()
        self.val_acc.reset()

    def on_validation_epoch_end(self) -> None:
        """Log ``val/perplexity``."""
        self.log("val/perplexity", self.val_loss.compute().exp(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log ``test/perplexity``."""
        self.log("test/perplexity", self.test_loss.compute().exp(), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the architecture in place of where the weights came from: those are in the checkpoint."""
        arguments = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if arguments is not None:
            network: Any = self.network
            arguments.update(model=None, config=network.config.to_dict())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of what is trained and, unless it is constant, its learning rate per step."""
        named = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        if not named:
            raise MisconfigurationException("CausalLanguageModel has no parameter that requires a gradient.")
        return scheduled(self._make_optimizer(named), self.schedule, self)
