"""Whether a saliency map points at what the network uses, as a torchmetrics metric."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_trust.attacks.preparation import prepared
from lightning_trust.functional.adversarial.saliency import Saliency, masked_inputs, saliency_map


class SaliencyFidelity(Metric):
    r"""Accuracy after the most salient pixels are removed, over the share that is removed, and the area below it.

    .. math:: A(q) = \frac1n \sum_i 1[\arg\max f(x_i^{(q)}) = y_i], \qquad
        \mathrm{area} = \frac{1}{q_F - q_1} \int_{q_1}^{q_F} A(q) \, dq

    where :math:`x^{(q)}` is :math:`x` with its :math:`\lfloor q n \rfloor` most salient features filled. The integral
    is the trapezoidal one, so a network whose accuracy stays at :math:`a` has the area :math:`a`. A map that is
    faithful to the network makes accuracy fall early: a smaller area is better between maps of one network. Between
    networks look at the whole curve, for one that is wrong from the start has a small area too.

    Paper: Improving Deep Learning Interpretability by Saliency Guided Training (NeurIPS 2021).

    Args:
        fractions: Shares of features to remove, ascending, at least two, in [0, 1).
        fill: What stands in their place: the sample's ``"mean"``, or ``"zero"``.
        saliency: Which map ranks the features of an update that brings none; see
            :func:`~lightning_trust.functional.adversarial.saliency_map`.
        feature_dims: Number of last dimensions that hold features; two for images if None.
        kwargs: Further arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> network = nn.Linear(4, 2, bias=False)
        >>> _ = network.weight.data.copy_(torch.tensor([[4.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.0]]))
        >>> metric = SaliencyFidelity(fractions=(0.0, 0.25, 0.5), fill="zero", feature_dims=1)
        >>> metric.update(network, torch.ones(1, 4), torch.tensor([0]))
        >>> metric.compute()
        {'curve': tensor([1., 0., 0.]), 'area': tensor(0.2500)}

    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(
        self,
        fractions: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        fill: Literal["mean", "zero"] = "mean",
        saliency: Saliency = "grad",
        feature_dims: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        shares = [float(fraction) for fraction in fractions]
        ascending = all(before < after for before, after in itertools.pairwise(shares))
        if len(shares) < 2 or not ascending or not (shares[0] >= 0.0 and shares[-1] < 1.0):
            raise ValueError(
                f"Expected argument `fractions` to be two or more ascending shares in [0, 1), but got {shares}."
            )
        for name, value, words in (
            ("fill", fill, ("mean", "zero")),
            ("saliency", saliency, ("grad", "abs_grad", "integrated")),
        ):
            if value not in words:
                raise ValueError(f"Expected argument `{name}` to be one of {list(words)}, but got {value!r}.")
        self.fractions = shares
        self.fill = fill
        self.saliency = saliency
        self.feature_dims = feature_dims
        self.add_state("correct", default=torch.zeros(len(shares), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, network: nn.Module, inputs: Tensor, targets: Tensor, saliency: Tensor | None = None) -> None:
        """Add samples. The network is in eval mode meanwhile, and is left as it was.

        Args:
            network: Maps inputs to logits ``(N, K)``.
            inputs: As the network takes them, shape ``(N, C, H, W)``, or others with ``feature_dims``.
            targets: Classes, int64, shape ``(N,)``.
            saliency: A map of another method, shape ``(N, H, W)``; that of the metric if None.

        Raises:
            ValueError: If a shape does not fit.

        """
        if targets.shape != inputs.shape[:1]:
            raise ValueError(
                f"Expected argument `targets` to hold a class for each input, shape ({len(inputs)},), but got"
                f" {tuple(targets.shape)}."
            )
        with prepared(network):
            if saliency is None:
                saliency = saliency_map(network, inputs, targets, self.saliency, self.feature_dims)
            elif saliency.shape != inputs.shape[:1] + inputs.shape[inputs.ndim - saliency.ndim + 1 :]:
                raise ValueError(
                    "Expected argument `saliency` to have a value for each feature of inputs of shape"
                    f" {tuple(inputs.shape)}, but got shape {tuple(saliency.shape)}."
                )
            with torch.no_grad():
                for place, fraction in enumerate(self.fractions):
                    # the lowest of the negative map are the most salient
                    removed, _ = masked_inputs(inputs, -saliency, fraction, self.fill)
                    self.correct[place] += (network(removed).argmax(dim=1) == targets).sum()
        self.total += len(targets)

    def compute(self) -> dict[str, Tensor]:
        """``"curve"``: accuracy at each of ``fractions``; ``"area"``, in [0, 1]; NaN without samples."""
        curve = self.correct / self.total
        shares = torch.tensor(self.fractions, device=curve.device, dtype=curve.dtype)
        return {"curve": curve, "area": torch.trapezoid(curve, shares) / (shares[-1] - shares[0])}
