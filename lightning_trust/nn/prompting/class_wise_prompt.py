"""One prompt for every class, each of which answers for its own class only."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import Tensor, nn

from lightning_trust.core.wrapping import Surround


class ClassWisePrompt(Surround, HyperparametersMixin):
    r"""Prompts for a frozen classifier of images in [0, 1], one for each of its classes, or one for all of them.

    From "Visual Prompting for Adversarial Robustness" (ICASSP 2023). Under the prompt of class :math:`i` an image is
    :math:`x^{(i)} = \mathrm{clip}(x + M \odot \delta_i, 0, 1)`. Each prompt answers for its own class:

    .. math:: \hat y = \arg\max_i q_{ii}, \qquad q_{ik} = \mathrm{softmax} f(x^{(i)})_k

    The scores that come out are :math:`\log q_{ii}`: attacks on the whole defence differentiate them. With one prompt
    they are the logits of the network. The network is run on as many images as there are prompts.

    Shape:
        - Input: ``(B, C, H, W)`` in [0, 1].
        - Output: scores ``(B, K)``.

    Args:
        num_prompts: Number of classes, or 1.
        image_size: Side of an image in pixels.
        channels: Channels of an image.
        shape: ``"pad"``, a frame; or ``"full"``.
        size: Width of the frame in pixels.
        clip: Whether prompted images are clipped to [0, 1].

    Attributes:
        delta: Prompts, shape ``(num_prompts, C, H, W)``, zero at first.

    Raises:
        ValueError: If the frame leaves nothing of the image, an image is outside [0, 1], or the network has not as many
            outputs as there are prompts.

    Example:
        >>> prompt = ClassWisePrompt(num_prompts=3, image_size=8, channels=1, size=2)
        >>> prompt.before(torch.full((2, 1, 8, 8), 0.5)).shape
        torch.Size([6, 1, 8, 8])
        >>> prompt.after(torch.zeros(6, 3)).exp()[0]
        tensor([0.3333, 0.3333, 0.3333])

    """

    mask: Tensor

    def __init__(
        self,
        num_prompts: int,
        image_size: int = 32,
        channels: int = 3,
        shape: Literal["pad", "full"] = "pad",
        size: int = 8,
        clip: bool = True,
    ) -> None:
        super().__init__()
        if num_prompts < 1:
            raise ValueError(f"Expected argument `num_prompts` to be at least 1, but got {num_prompts}.")
        if shape not in ("pad", "full"):
            raise ValueError(f"Expected argument `shape` to be 'pad' or 'full', but got {shape!r}.")
        mask = torch.ones(1, image_size, image_size)
        if shape == "pad":
            if not (size >= 1 and 2 * size < image_size):
                raise ValueError(
                    f"Expected argument `size` to be at least 1 and 2 * size below image_size={image_size}, but got"
                    f" {size}."
                )
            mask[:, size:-size, size:-size] = 0.0
        self.save_hyperparameters()
        self.num_prompts = num_prompts
        self.clip = clip
        self.delta = nn.Parameter(torch.zeros(num_prompts, channels, image_size, image_size))
        self.register_buffer("mask", mask, persistent=False)

    def images(self, x: Tensor) -> Tensor:
        """Every image under every prompt, ``(B, P, C, H, W)``."""
        if x.shape[1:] != self.delta.shape[1:]:
            raise ValueError(
                f"Expected images of shape (B, {', '.join(map(str, self.delta.shape[1:]))}), but got {tuple(x.shape)}."
            )
        prompted = x[:, None] + self.mask * self.delta
        return prompted.clamp(0.0, 1.0) if self.clip else prompted

    def before(self, inputs: Tensor) -> Tensor:
        """Every image under every prompt, one behind the other, ``(B * P, C, H, W)``."""
        return self.images(inputs).flatten(0, 1)

    def grouped(self, outputs: Tensor) -> Tensor:
        """Outputs of the network for these, ``(B, P, K)``."""
        if outputs.ndim != 2 or (self.num_prompts > 1 and outputs.shape[1] != self.num_prompts):
            raise ValueError(
                f"Expected the network to give outputs of shape (B, {self.num_prompts}), one class a prompt, but got"
                f" {tuple(outputs.shape)}."
            )
        return outputs.view(-1, self.num_prompts, outputs.shape[1])

    def after(self, outputs: Tensor) -> Tensor:
        """Scores of the classes: log-confidences of prompts in their own class."""
        grouped = self.grouped(outputs)
        if self.num_prompts == 1:
            return grouped[:, 0]
        return grouped.float().log_softmax(dim=2).diagonal(dim1=1, dim2=2)

    @torch.no_grad()
    def saturated(self, x: Tensor) -> Tensor:
        """Share of prompted pixels that lie at an end of [0, 1], where the prompt has no gradient."""
        images = self.images(x)
        ends = ((images <= 0.0) | (images >= 1.0)).float() * self.mask
        return ends.sum() / (self.mask.sum() * images[:, :, :, 0, 0].numel())
