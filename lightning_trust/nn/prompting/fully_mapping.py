"""A mapping of outputs that is trained with the prompt."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import Tensor, nn


class FullyMapping(nn.Module, HyperparametersMixin):
    r"""Logits of target classes as a trained linear map of all source logits: :math:`z = W f(x) + b`.

    From "AutoVP: An Automated Visual Prompting Framework and Benchmark" (ICLR 2024).

    Shape:
        - Input: source logits, ``(B, num_source)``.
        - Output: target logits, ``(B, num_target)``.

    Args:
        num_source: Source classes of the frozen network.
        num_target: Classes of the task.
        init: ``"default"``, that of ``nn.Linear``; or ``"identity"``: :math:`W_{ij} = [i = j]`, :math:`b = 0`, which
            for the bank of a :class:`~lightning_trust.nn.ClipClassifier` is the classifier of its first template.

    Raises:
        ValueError: If there are fewer source than target classes for the identity.

    Example:
        >>> mapping = FullyMapping(3, 2, init="identity")
        >>> mapping(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[1.0, 2.0]]

    """

    def __init__(self, num_source: int, num_target: int, init: Literal["default", "identity"] = "default") -> None:
        super().__init__()
        if init not in ("default", "identity"):
            raise ValueError(f"Expected argument `init` to be 'default' or 'identity', but got {init!r}.")
        if init == "identity" and num_source < num_target:
            raise ValueError(
                "Expected argument `num_source` to be at least num_target for init='identity', but got"
                f" num_source={num_source} and num_target={num_target}."
            )
        self.save_hyperparameters()
        self.num_source = num_source
        self.num_target = num_target
        self.linear = nn.Linear(num_source, num_target)
        if init == "identity":
            with torch.no_grad():
                self.linear.weight.copy_(torch.eye(num_target, num_source))
                self.linear.bias.zero_()

    def forward(self, logits: Tensor) -> Tensor:
        """Source logits to target logits."""
        if logits.ndim != 2 or logits.shape[1] != self.num_source:
            raise ValueError(
                f"Expected the network to give source logits of shape (B, num_source={self.num_source}), but got"
                f" {tuple(logits.shape)}."
            )
        return self.linear(logits)
