"""How much of a saliency map lies where it should, as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_trust.attacks.preparation import prepared
from lightning_trust.functional.adversarial.saliency import Saliency, saliency_map


class SaliencyMass(Metric):
    r"""Share of the saliency of an image that lies inside a region of it: a box of an annotator, the object, a mark.

    .. math:: \frac1n \sum_i \frac{\sum_{p \in R_i} \lvert S_{ip} \rvert}{\sum_p \lvert S_{ip} \rvert}

    A map that knows nothing has the share of the pixels that lie inside, ``regions.float().mean()``: compare with that.

    Papers: Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks (CVPR workshops 2020), whose
    energy-based pointing game this is; Saliency Guided Adversarial Training for Learning Generalizable Features with
    Applications to Medical Imaging Classification System (arXiv:2209.04326).

    Args:
        saliency: Which map an update has that brings none; see
            :func:`~lightning_trust.functional.adversarial.saliency_map`. Its magnitude counts: ``"grad"`` averages
            channels before it, ``"abs_grad"`` after.
        feature_dims: Number of last dimensions that hold features; two for images if None.
        kwargs: Further arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``saliency`` is another word.

    Warns:
        UserWarning: If images are left out because their map is zero all over.

    Example:
        >>> network = nn.Linear(4, 2, bias=False)
        >>> _ = network.weight.data.copy_(torch.tensor([[3.0, -3.0, 1.0, 1.0], [0.0, 0.0, 2.0, 1.0]]))
        >>> metric = SaliencyMass(feature_dims=1)
        >>> metric.update(network, torch.ones(1, 4), torch.tensor([0]), torch.tensor([[True, True, False, False]]))
        >>> metric.compute()
        tensor(0.7500)

    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    mass: Tensor
    total: Tensor
    empty: Tensor

    def __init__(self, saliency: Saliency = "abs_grad", feature_dims: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        words = ("grad", "abs_grad", "integrated")
        if saliency not in words:
            raise ValueError(f"Expected argument `saliency` to be one of {list(words)}, but got {saliency!r}.")
        self.saliency: Saliency = saliency
        self.feature_dims = feature_dims
        self.add_state("mass", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("empty", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self, network: nn.Module, inputs: Tensor, targets: Tensor, regions: Tensor, saliency: Tensor | None = None
    ) -> None:
        """Add samples. The network is in eval mode meanwhile, and is left as it was.

        Args:
            network: Maps inputs to logits ``(N, K)``.
            inputs: As the network takes them, shape ``(N, C, H, W)``, or others with ``feature_dims``.
            targets: Classes, int64, shape ``(N,)``, or multi-hot, shape ``(N, K)``.
            regions: Boolean, shape ``(N, H, W)``: True inside. Leave out images whose region is empty.
            saliency: A map of another method, shape ``(N, H, W)``; that of the metric if None.

        Raises:
            ValueError: If a shape or type does not fit, a region is empty, or a map is not finite.

        """
        if targets.shape[:1] != inputs.shape[:1]:
            raise ValueError(
                f"Expected argument `targets` to have a row for each of {len(inputs)} inputs, but got shape"
                f" {tuple(targets.shape)}."
            )
        if saliency is None:
            with prepared(network):
                saliency = saliency_map(network, inputs, targets, self.saliency, self.feature_dims)
        elif saliency.shape != inputs.shape[:1] + inputs.shape[inputs.ndim - saliency.ndim + 1 :]:
            raise ValueError(
                "Expected argument `saliency` to have a value for each feature of inputs of shape"
                f" {tuple(inputs.shape)}, but got shape {tuple(saliency.shape)}."
            )
        elif not bool(torch.isfinite(saliency).all()):
            raise ValueError("Expected argument `saliency` to be finite, but got NaN or infinite values.")
        if regions.dtype != torch.bool or regions.shape != saliency.shape:
            raise ValueError(
                f"Expected argument `regions` to be boolean of shape {tuple(saliency.shape)}, but got"
                f" {regions.dtype} of shape {tuple(regions.shape)}."
            )
        inside = regions.flatten(1)
        without = (~inside.any(dim=1)).nonzero().flatten().tolist()
        if without:
            raise ValueError(
                f"Expected argument `regions` to hold a feature of every image, but got empty ones at {without[:5]}."
                " Leave these images out."
            )
        # float64 on the CPU: not every accelerator has it, and small gradients add up
        magnitude = saliency.detach().flatten(1).cpu().double().abs()
        whole = magnitude.sum(dim=1)
        known = whole > 0.0
        shares = (magnitude * inside.cpu()).sum(dim=1)[known] / whole[known]
        self.mass += shares.sum().to(self.mass)
        self.total += known.sum().to(self.total)
        self.empty += (~known).sum().to(self.empty)

    def compute(self) -> Tensor:
        """The mean share, in [0, 1]; NaN without samples."""
        if int(self.empty):
            rank_zero_warn(f"{int(self.empty)} images have a map that is zero all over and are left out.")
        return (self.mass / self.total).float()
