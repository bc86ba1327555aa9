"""A layer before a classifier that makes it surer of what it sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trust.core.modes import frozen_parameters


class AntiAdversary(nn.Module):
    r"""Moves every input towards what the classifier takes it for, before it is classified.

    "Combating Adversaries with Anti-Adversaries" (AAAI 2022). From :math:`r = 0`, with the predicted class
    :math:`\hat y` of the input as it came,

    .. math:: r \leftarrow r - \alpha \, \mathrm{sign} \nabla_r \mathrm{CE}(f(x + r), \hat y)

    a few times; the outputs are :math:`f(x + r)`. A test-time defence that costs a backward pass a step. For an attack
    that differentiates it, :math:`r` is a constant.

    Args:
        network: The classifier.
        steps: Number of steps.
        lr: Size :math:`\alpha` of a step.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> x = torch.randn(5, 2)
        >>> bool((AntiAdversary(layer)(x).argmax(1) == layer(x).argmax(1)).all())
        True

    """

    def __init__(self, network: nn.Module, steps: int = 2, lr: float = 0.15) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"Expected argument `steps` to be at least 1, but got {steps}.")
        if not lr > 0.0:
            raise ValueError(f"Expected argument `lr` to be positive, but got {lr}.")
        self.network = network
        self.steps = steps
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to outputs of the classifier for what they were moved to."""
        with torch.inference_mode(False), torch.enable_grad(), frozen_parameters(self.network.parameters()):
            start = x.detach().clone()
            moved = start
            predicted = None
            for _ in range(self.steps):
                place = moved.detach().requires_grad_()
                outputs = self.network(place)
                predicted = outputs.argmax(dim=1) if predicted is None else predicted
                (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, predicted, reduction="sum"), place)
                moved = place.detach() - self.lr * gradient.sign()
        return self.network(x + (moved - start).detach())
