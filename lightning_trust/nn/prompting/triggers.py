"""Universal triggers for images and tables: one learned pattern for all inputs of a frozen network."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import Tensor, nn

Corner = Literal["tl", "tr", "bl", "br"]


class _ImageTrigger(nn.Module, HyperparametersMixin):
    """A pattern of learned pixels on a canvas; only these are parameters."""

    def __init__(self, image_size: int, channels: int, where: Tensor) -> None:
        super().__init__()
        self.image_size = image_size
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(channels, int(where.sum())).uniform_(-1.0, 1.0))
        # not in the state: they follow from the arguments
        self.where: Tensor
        self.register_buffer("where", where, persistent=False)
        self.places: Tensor
        self.register_buffer("places", where.flatten().nonzero().flatten(), persistent=False)

    @property
    def pattern(self) -> Tensor:
        """What is added to the canvas, shape ``(C, S, S)``: in (-1, 1) where there is a trigger, and 0 elsewhere."""
        size = self.image_size
        flat = self.weight.new_zeros(self.channels, size * size)
        return flat.index_copy(1, self.places, self.weight.tanh()).view(self.channels, size, size)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is learned."""
        return self.weight.nbytes

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__} is for images of shape (N, {self.channels}, H, W), but got"
                f" {tuple(images.shape)}. Pass `channels=...`."
            )


class BorderTrigger(_ImageTrigger):
    r"""Shrinks an image and learns the frame around it.

    .. math:: \tilde x = \mathrm{pad}_b(\mathrm{resize}(x, S - 2b)) + \tanh(W \odot M)

    with :math:`M` 1 on the frame of width :math:`b` and 0 inside: the content keeps its values. Images are in raw
    units, [0, 1]; the network gets values of the frame in (-1, 1), as in the paper. The resize is bilinear with
    antialiasing, and none where the sizes agree.

    Paper: Fairness Reprogramming (NeurIPS 2022).

    Shape:
        - Input: images :math:`(N, C, H, W)` of any size.
        - Output: :math:`(N, C, S, S)`.

    Args:
        image_size: Side :math:`S` of what the network is given, in pixels.
        border: Width :math:`b` of the frame in pixels, at least 0.
        channels: Channels of an image.

    Raises:
        ValueError: If a number is out of its range, or the frame leaves no room for an image.

    Example:
        >>> trigger = BorderTrigger(image_size=8, border=2, channels=1)
        >>> images = torch.full((1, 1, 4, 4), 0.5)
        >>> changed = trigger(images)
        >>> changed.shape, bool((changed[..., 2:-2, 2:-2] == images).all()), trigger.weight.numel()
        (torch.Size([1, 1, 8, 8]), True, 48)

    """

    def __init__(self, image_size: int = 224, border: int = 20, channels: int = 3) -> None:
        _check_sizes(image_size, channels)
        if border < 0 or 2 * border >= image_size:
            raise ValueError(
                f"Expected argument `border` to be at least 0 and less than half of `image_size` ({image_size}), but"
                f" got {border}."
            )
        where = torch.ones(image_size, image_size, dtype=torch.bool)
        where[border : image_size - border, border : image_size - border] = False
        super().__init__(image_size, channels, where)
        self.border = border
        self.save_hyperparameters()

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> images with a frame ``(N, C, S, S)``."""
        self._check(images)
        inner = self.image_size - 2 * self.border
        if images.shape[-2:] != (inner, inner):
            images = F.interpolate(images, (inner, inner), mode="bilinear", antialias=True, align_corners=False)
        return F.pad(images, (self.border,) * 4) + self.pattern


class PatchTrigger(_ImageTrigger):
    r"""Overwrites a square in a corner of an image with learned pixels.

    .. math:: \tilde x = x \odot (1 - M) + \tanh(W \odot M)

    Paper: Fairness Reprogramming (NeurIPS 2022).

    Shape:
        - Input: images :math:`(N, C, S, S)`.
        - Output: the same.

    Args:
        image_size: Side :math:`S` of an image in pixels.
        patch: Side of the square in pixels, at least 1 and less than half of the image's.
        corner: ``"tl"``, ``"tr"``, ``"bl"`` or ``"br"``: top or bottom, left or right.
        channels: Channels of an image.

    Raises:
        ValueError: If an argument is out of its range, or images are of another size.

    Example:
        >>> trigger = PatchTrigger(image_size=8, patch=3, corner="br", channels=1)
        >>> changed = trigger(torch.full((1, 1, 8, 8), 2.0)) != 2.0
        >>> changed.sum().item(), bool(changed[..., 5:, 5:].all())
        (9, True)

    """

    def __init__(self, image_size: int = 224, patch: int = 30, corner: Corner = "tl", channels: int = 3) -> None:
        _check_sizes(image_size, channels)
        if patch < 1 or 2 * patch >= image_size:
            raise ValueError(
                f"Expected argument `patch` to be at least 1 and less than half of `image_size` ({image_size}), but got"
                f" {patch}."
            )
        if corner not in get_args(Corner):
            raise ValueError(f"Expected argument `corner` to be 'tl', 'tr', 'bl' or 'br', but got {corner!r}.")
        where = torch.zeros(image_size, image_size, dtype=torch.bool)
        start = image_size - patch
        rows = slice(None, patch) if corner[0] == "t" else slice(start, None)
        where[rows, slice(None, patch) if corner[1] == "l" else slice(start, None)] = True
        super().__init__(image_size, channels, where)
        self.patch = patch
        self.corner: Corner = corner
        self.save_hyperparameters()

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, S, S)`` -> images with a patch."""
        self._check(images)
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"Expected images of {self.image_size} by {self.image_size} pixels, the `image_size` of PatchTrigger,"
                f" but got {images.shape[-2]} by {images.shape[-1]}."
            )
        return torch.where(self.where, self.pattern.to(images.dtype), images)


class ConcatTrigger(nn.Module, HyperparametersMixin):
    r"""Weighs and shifts the features of a table.

    .. math:: \tilde x = x \odot m + \delta

    with a learned mask :math:`m`, 1 in the beginning, and a learned offset :math:`\delta`, 0 in the beginning: an
    untrained trigger changes nothing.

    Paper: Fairness Reprogramming (NeurIPS 2022), whose triggers are for images and text.

    Shape:
        - Input: :math:`(N, F)`.
        - Output: the same.

    Args:
        num_features: Number of features :math:`F`.
        mask: Whether there is a mask beside the offset.

    Raises:
        ValueError: If ``num_features`` is not positive, or inputs have another number of features.

    Example:
        >>> trigger = ConcatTrigger(2)
        >>> trigger.offset.data += 1.0
        >>> trigger(torch.tensor([[3.0, 4.0]]))
        tensor([[4., 5.]], grad_fn=<AddBackward0>)

    """

    def __init__(self, num_features: int, mask: bool = True) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"Expected argument `num_features` to be a positive integer, but got {num_features}.")
        self.num_features = num_features
        self.mask = nn.Parameter(torch.ones(num_features)) if mask else None
        self.offset = nn.Parameter(torch.zeros(num_features))
        self.save_hyperparameters()

    @property
    def num_bytes(self) -> int:
        """Bytes of what is learned."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(N, F)`` -> features ``(N, F)``."""
        if features.shape[-1] != self.num_features:
            raise ValueError(
                f"Expected inputs of shape (N, {self.num_features}), the `num_features` of ConcatTrigger, but got"
                f" {tuple(features.shape)}."
            )
        return (features if self.mask is None else features * self.mask) + self.offset


def _check_sizes(image_size: int, channels: int) -> None:
    for name, value in (("image_size", image_size), ("channels", channels)):
        if value < 1:
            raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
