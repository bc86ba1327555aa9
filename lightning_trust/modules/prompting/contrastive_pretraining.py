"""Contrastive pre-training of a CLIP model on images and captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_trust.core.hyperparameters import save_arguments
from lightning_trust.core.learning_rates import LearningRates, check_schedule, scheduled
from lightning_trust.core.space import InputSpace
from lightning_trust.nn.prompting.clip_templates import DEFAULT_TEMPLATE
from lightning_trust.nn.prompting.open_clip_models import (
    config_of,
    create_clip,
    load_open_clip,
    preprocessing,
    save_clip,
)
from lightning_trust.nn.prompting.text_encoder import class_texts, tokenized

#: Images, labels, and the captions that training, but not zero-shot classification, needs.
Batch = Sequence[Any]
#: CLIP's authors let the scale of the logits grow to a hundred.
LARGEST_SCALE = math.log(100.0)


class ContrastivePretraining(pl.LightningModule):
    r"""Train a CLIP model of open_clip to tell which caption belongs to which image.

    "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020. With embeddings
    :math:`u_i` of the images and :math:`v_i` of the captions of a batch, all of length 1, and a scale :math:`\tau`
    that is learned,

    .. math:: L = -\frac{1}{2N} \sum_{i=1}^{N} \left[
        \log \frac{\exp(e^\tau u_i^\top v_i)}{\sum_j \exp(e^\tau u_i^\top v_j)}
        + \log \frac{\exp(e^\tau u_i^\top v_i)}{\sum_j \exp(e^\tau u_j^\top v_i)} \right]

    over the batches of all ranks together, with gradients through all of them, so that ranks compute what one process
    with the whole batch would. As the authors do, :math:`\tau` is held at or below :math:`\log 100` after every step
    (and at or above nought, as open_clip does), and gains, biases and :math:`\tau` are not decayed. Within a window of
    accumulated gradients each micro-batch has its own negatives.

    Logs ``train/loss`` and ``train/scale`` (:math:`e^\tau`) per step; ``val/loss``, ``test/loss`` where batches have
    captions; and ``val/acc``, ``test/acc``, the share of images that zero-shot classification gets right. ``predict``
    gives the logits of the classes. The model takes raw images, [0, 1], and normalises them as its configuration says.

    When training ends the model is written to ``folder`` as open_clip publishes models (see
    :func:`~lightning_trust.nn.save_clip`), so that ``create_backbone("open_clip:<folder>", class_names=[...])`` and
    ``open_clip.create_model`` load it like one of those.

    Shape:
        - Batch: ``[images, targets, captions]``: float ``(B, C, H, W)`` in [0, 1] with ``C`` 3, or 1, which is
          repeated; int64 ``(B,)``; a list of ``B`` texts. For validation and test the captions may be missing.
        - ``forward``: images and texts -> embeddings of length 1, ``(B, D)`` each.

    Args:
        model: Name of a model of open_clip, perhaps with weights to go on from, for
            :func:`~lightning_trust.nn.create_clip`.
        config: In place of ``model``: the configuration of a model of random weights, ``embed_dim``, ``vision_cfg``
            and ``text_cfg``; or ``model_cfg`` with these, and ``preprocess_cfg`` with ``mean`` and ``std``.
        class_names: Classes of zero-shot classification, by label; those of the data module if None.
        templates: Text templates of zero-shot classification; a class has the mean of its embeddings.
        folder: Where the model is written when training ends; nowhere if None.
        optimizer: Called with groups of parameters, gives the optimizer. By default the authors': AdamW with learning
            rate 5e-4, betas 0.9 and 0.98, eps 1e-6 and weight decay 0.2.
        schedule: ``"cosine"``, ``"cyclic"`` or ``"constant"`` learning rate; or a schedule of core.schedules.

    Attributes:
        network: The model of open_clip; it holds all parameters.
        tokenizer: Its tokenizer.
        config: Its configuration.

    Raises:
        ValueError: If not exactly one of ``model`` and ``config`` is given, nobody knows the model, a template has not
            one slot, or a caption does not fit into the context of the model.
        MisconfigurationException: If there are no class names, or training has no captions.

    Example:
        >>> import torch
        >>> model = ContrastivePretraining(
        ...     config={
        ...         "embed_dim": 8,
        ...         "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
        ...         "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
        ...     }
        ... )
        >>> images, texts = model(torch.rand(2, 1, 28, 28), ["a bag.", "a coat."])
        >>> images.shape, texts.shape
        (torch.Size([2, 8]), torch.Size([2, 8]))

    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        templates: Sequence[str] = (DEFAULT_TEMPLATE,),
        folder: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
        ),
        schedule: LearningRates = "cosine",
    ) -> None:
        super().__init__()
        check_schedule(schedule)
        class_texts(class_names or ["class"], templates)
        save_arguments(self, ["optimizer", *([] if isinstance(schedule, str) else ["schedule"])])
        network, self.tokenizer = create_clip(model, config)
        self.config = config_of(network, model, config)
        self.network: Any = network
        self.class_names = class_names
        self.templates = tuple(templates)
        self.folder = folder
        self.schedule = schedule
        self._make_optimizer = optimizer
        _, mean, std = preprocessing(network)
        self.input_space = InputSpace(0.0, 1.0, mean, std)
        self.val_acc, self.test_acc = MeanMetric(), MeanMetric()
        self._classes: Tensor | None = None

    def forward(self, images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Raw images ``(B, C, H, W)`` and ``N`` texts -> embeddings of length 1, ``(B, D)`` and ``(N, D)``."""
        return self.embed_images(images), self.embed_texts(texts)

    def embed_images(self, images: Tensor) -> Tensor:
        """Raw images ``(B, C, H, W)`` -> embeddings of length 1, ``(B, D)``."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"Expected images of shape (B, 3, H, W) or (B, 1, H, W), but got {tuple(images.shape)}.")
        inputs = self.input_space.from_raw(images.expand(-1, 3, -1, -1))
        return F.normalize(self.network.encode_image(inputs), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> embeddings of length 1, ``(N, D)``; equal ones are computed once."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        tokens = tokenized(self.tokenizer, list(places)).to(self.device)
        found = F.normalize(self.network.encode_text(tokens), dim=-1)
        return found[torch.tensor([places[text] for text in texts], device=found.device)]

    def zero_shot(self, images: Tensor, class_names: Sequence[str]) -> Tensor:
        """Raw images ``(B, C, H, W)`` -> logits of classes by name, ``(B, K)``."""
        return self._logits(images, self._class_embeddings(class_names))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        if len(batch) < 3:
            raise MisconfigurationException(
                f"ContrastivePretraining needs batches [images, targets, captions], but got {len(batch)} parts."
                " `FashionMNISTCaptions` has them."
            )
        loss = self._contrast(batch, gather=True)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        self.log("train/scale", self.network.logit_scale.detach().exp().mean(), batch_size=len(batch[0]))
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hold the scale of the logits between 1 and 100."""
        self.network.logit_scale.clamp_(0.0, LARGEST_SCALE)

    def on_validation_epoch_start(self) -> None:
        """Embed the classes anew."""
        self._start(self.val_acc)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/acc``, and ``val/loss`` where there are captions."""
        self._evaluate(batch, "val", self.val_acc)

    def on_test_epoch_start(self) -> None:
        """Embed the classes anew."""
        self._start(self.test_acc)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/acc``, and ``test/loss`` where there are captions."""
        self._evaluate(batch, "test", self.test_acc)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits of the classes ``(B, K)``."""
        return self.zero_shot(batch if isinstance(batch, Tensor) else batch[0], self._names())

    def on_train_end(self) -> None:
        """Write the model to ``folder``."""
        if self.folder is not None and self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.export(self.folder)

    def export(self, folder: str | Path) -> Path:
        """Write the model as open_clip publishes models.

        Returns:
            The file of the weights.

        """
        return save_clip(folder, self.network, self.config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the architecture in place of where the weights came from: those are in the checkpoint."""
        arguments = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if arguments is not None:
            arguments.update(model=None, config=self.config)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and, unless it is constant, its learning rate per step."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter.ndim >= 2]},
            {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        return scheduled(self._make_optimizer(groups), self.schedule, self)

    def _contrast(self, batch: Batch, gather: bool) -> Tensor:
        ranks = {"rank": self.global_rank, "world_size": self.trainer.world_size} if gather else {}
        # each rank has its rows of the logits, and gradients come back from the others: DDP's mean of both is then
        # the gradient of the whole batch, which it is not without `gather_with_grad`
        loss = load_open_clip().ClipLoss(local_loss=True, gather_with_grad=True, **ranks)
        images, texts = self(batch[0], batch[2])
        bias = getattr(self.network, "logit_bias", None)
        return loss(images, texts, self.network.logit_scale.exp(), bias)

    def _names(self) -> Sequence[str]:
        datamodule = getattr(self.trainer, "datamodule", None)
        names: Sequence[str] | None = self.class_names or getattr(datamodule, "class_names", None)
        if names is None:
            raise MisconfigurationException(
                "ContrastivePretraining needs the names of the classes. Pass `class_names`, or a data module that has"
                " them."
            )
        return names

    def _start(self, measure: MeanMetric) -> None:
        # what `Trainer.validate` made in inference mode cannot be updated in a fit
        measure.reset()
        self._classes = self._class_embeddings(self._names())

    def _class_embeddings(self, class_names: Sequence[str]) -> Tensor:
        texts = class_texts(class_names, self.templates)
        each = self.embed_texts(texts).unflatten(0, (len(self.templates), len(class_names)))
        return F.normalize(each.mean(dim=0), dim=-1)

    def _logits(self, images: Tensor, classes: Tensor) -> Tensor:
        logits: Tensor = self.network.logit_scale.exp() * (self.embed_images(images) @ classes.T)
        return logits

    def _evaluate(self, batch: Batch, stage: str, measure: MeanMetric) -> None:
        images, targets = batch[0], batch[1]
        assert self._classes is not None  # noqa: S101 - made when the epoch starts
        measure.update((self._logits(images, self._classes).argmax(dim=1) == targets).float())
        self.log(f"{stage}/acc", measure, prog_bar=True, batch_size=len(targets))
        if len(batch) > 2:
            loss = self._contrast(batch, gather=False)
            self.log(f"{stage}/loss", loss, batch_size=len(targets), sync_dist=True)
