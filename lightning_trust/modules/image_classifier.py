"""Training of an image classifier."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_trust.core.hyperparameters import save_arguments
from lightning_trust.core.learning_rates import LearningRates, check_schedule, scheduled
from lightning_trust.nn import create_network


class ImageClassifier(pl.LightningModule):
    r"""Cross-entropy training of a classifier of images, with a learning rate that falls to zero along a cosine.

    With :math:`T` optimizer steps in the whole run, step :math:`t = 0, \dots, T - 1` has the learning rate
    :math:`\eta_t = \frac{\eta_0}{2} (1 + \cos(\pi t / T))` under ``schedule="cosine"``, and
    :math:`\eta_t = \eta_0 (1 - |2 t / T - 1|)`, up from zero and down again, under ``"cyclic"``.

    Logs ``train/loss`` per step, and ``val/loss``, ``val/acc``, ``test/loss``, ``test/acc`` (shares in [0, 1]) per
    epoch. ``predict`` gives the class probabilities, float ``(B, K)``.

    Shape:
        - Batch: ``[inputs, targets]``, inputs ``(B, C, H, W)``, targets int64 ``(B,)`` in ``[0, K)``; for ``predict``
          the inputs alone will do.
        - ``forward``: inputs -> logits ``(B, K)``.

    Args:
        network: Name of a network (this package's ``SmallCNN``, ``resnet18_small``, ``resnet20``; timm's;
            torchvision's; an import path; see :func:`lightning_trust.nn.create_network`), or the network itself.
        num_classes: Number of classes.
        in_channels: Channels of an image; not looked at where ``network`` is a module.
        network_args: Further arguments of a network given by name, e.g. ``{"widths": [8, 8]}``.
        optimizer: Called with the parameters, gives the optimizer. By default SGD with learning rate 0.1, momentum 0.9
            and weight decay 5e-4.
        schedule: ``"cosine"``, ``"cyclic"`` or ``"constant"`` learning rate; or a schedule of core.schedules, whose
            value at the epochs gone by, fractions included, multiplies the learning rate of the optimizer: a warm-up,
            for one, is ``LinearWarmup(0.0, 1.0, epochs=5)``.

    Attributes:
        network: The network; it holds all parameters.

    Raises:
        ValueError: If nobody knows the name of the network (close names are listed), or an argument is out of its
            range.
        MisconfigurationException: If ``network_args`` are given with a network that is built already, the cosine or
            the cycle is asked for in a run without an end, or a schedule in a run whose epochs are of unknown length.

    Note:
        A checkpoint keeps what is plain data among the arguments, so ``load_from_checkpoint`` needs ``network`` again
        where that was a module, and ``optimizer`` and a ``schedule`` that is no word where training goes on. Under
        LightningCLI it keeps all.

    Example:
        >>> import torch
        >>> from lightning_trust.modules import ImageClassifier
        >>> classifier = ImageClassifier("SmallCNN", num_classes=10)
        >>> classifier(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> ImageClassifier("resnet19")
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `network` to be a network of lightning_trust.nn, timm or torchvision, or the
        import path of one, but got 'resnet19'. Did you mean one of [...'resnet18'...]?

    """

    #: Arguments of a subclass that are objects, which a checkpoint does not keep outside LightningCLI.
    built_arguments: ClassVar[tuple[str, ...]] = ()
    #: Fewest classes that make a problem.
    least_classes = 2
    #: Name of the measure in the logs of validation and test.
    measure = "acc"

    def __init__(
        self,
        network: str | nn.Module = "SmallCNN",
        num_classes: int = 10,
        in_channels: int = 1,
        network_args: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: LearningRates = "cosine",
    ) -> None:
        super().__init__()
        if num_classes < self.least_classes:
            raise ValueError(
                f"Expected argument `num_classes` to be an integer of at least {self.least_classes},"
                f" but got {num_classes}."
            )
        check_schedule(schedule)
        if isinstance(network, nn.Module) and network_args:
            raise MisconfigurationException(
                f"Argument `network_args` is for a network given by name, but got network_args={network_args} and a"
                f" {type(network).__name__} that is built already."
            )
        parts = {"network": network, "schedule": schedule}
        objects = [name for name, part in parts.items() if not isinstance(part, str)]
        save_arguments(self, ["optimizer", *self.built_arguments, *objects])
        self.network = (
            create_network(network, in_channels, num_classes, **(network_args or {}))
            if isinstance(network, str)
            else network
        )
        self.num_classes = num_classes
        self.schedule = schedule
        self._make_optimizer = optimizer
        self.val_measure = self.new_measure()
        self.test_measure = self.new_measure()

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> logits ``(B, K)``."""
        return self.network(x)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of a batch."""
        return F.cross_entropy(logits, targets)

    def new_measure(self) -> Metric:
        """The share of images that are classified correctly."""
        return MulticlassAccuracy(self.num_classes, average="micro")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Those of the classes."""
        return logits.softmax(dim=1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        inputs, targets = batch
        loss = self.loss(self(inputs), targets)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` and the measure, ``val/acc``."""
        self._evaluate(batch, "val", self.val_measure)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test/loss`` and the measure, ``test/acc``."""
        self._evaluate(batch, "test", self.test_measure)

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Class probabilities ``(B, K)`` of a batch."""
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        return self.probabilities(self(inputs))

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, measure: Metric) -> None:
        inputs, targets = batch
        logits = self(inputs)
        measure.update(logits, targets)
        rows = len(targets)
        # averaged over rows here and over ranks by Lightning, as the measure is by torchmetrics
        self.log(f"{stage}/loss", self.loss(logits, targets), batch_size=rows, sync_dist=True)
        self.log(f"{stage}/{self.measure}", measure, prog_bar=True, batch_size=rows)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and, unless it is constant, its learning rate per step."""
        return scheduled(self._make_optimizer(self.parameters()), self.schedule, self)
