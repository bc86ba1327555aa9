"""Training of an image classifier whose images may have several labels, or none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_trust.metrics import MacroAUROC
from lightning_trust.modules.image_classifier import ImageClassifier


class MultiLabelClassifier(ImageClassifier):
    r"""An :class:`ImageClassifier` with a yes or no for each class: binary cross-entropy, and AUROC as its measure.

    .. math:: -\frac{1}{NK} \sum_{i,k} y_{ik} \log \sigma(f_k(x_i)) + (1 - y_{ik}) \log \sigma(-f_k(x_i))

    Logs ``train/loss`` per step, and ``val/loss``, ``val/auroc``, ``test/loss``, ``test/auroc`` (the mean of the
    labels' areas under the ROC curve, in [0, 1]) per epoch. ``predict`` gives the probability of each label, float
    ``(B, K)``.

    Shape:
        - Batch: ``[inputs, targets]``, inputs ``(B, C, H, W)``, targets multi-hot, float or integer, ``(B, K)``.
        - ``forward``: inputs -> logits ``(B, K)``.

    Args:
        network: As in :class:`ImageClassifier`, and so are all others.
        num_classes: Number of labels, at least one.
        in_channels: Channels of an image.
        network_args: Further arguments of a network given by name.
        optimizer: Called with the parameters, gives the optimizer.
        schedule: Learning rate over the run.

    Raises:
        ValueError: If an argument is out of its range, or targets are not of the shape of the logits (in the first
            step).
        MisconfigurationException: As :class:`ImageClassifier`.

    Example:
        >>> classifier = MultiLabelClassifier(num_classes=3, network_args={"widths": [4]})
        >>> inputs, targets = torch.zeros(2, 1, 8, 8), torch.tensor([[1, 0, 1], [0, 0, 0]])
        >>> classifier.loss(classifier(inputs) * 0.0, targets).item()
        0.6931471824645996

    """

    least_classes = 1
    measure = "auroc"

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean binary cross-entropy of a batch and its labels."""
        if targets.shape != logits.shape:
            raise ValueError(
                f"Expected targets to be multi-hot of shape {tuple(logits.shape)}, like the logits, but got"
                f" {tuple(targets.shape)}. For one class an image take ImageClassifier."
            )
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))

    def new_measure(self) -> Metric:
        """A mean area under the ROC curve."""
        return MacroAUROC()

    def probabilities(self, logits: Tensor) -> Tensor:
        """That of each label."""
        return torch.sigmoid(logits)
