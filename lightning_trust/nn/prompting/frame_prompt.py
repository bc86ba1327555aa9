"""A frame around an image that is placed at a size which is given or learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import Tensor, nn

from lightning_trust.nn.prompting.prompts import Prompt


class LearnableScale(nn.Module, HyperparametersMixin):
    r"""Places images in the middle of a canvas at a size that is given, or learned with the prompt.

    From "AutoVP: An Automated Visual Prompting Framework and Benchmark" (ICLR 2024). An image of side :math:`d_0` is
    put on a canvas of side :math:`S` and sampled anew about its middle, :math:`y(u) = x(u / s)` for points :math:`u` of
    the canvas, bilinearly (``align_corners=False``, black outside). The gradient reaches :math:`s` through the points.
    What counts as occupied is a square of :math:`\min(\lfloor d_0 s \rfloor, S)` pixels, through which no gradient
    goes. A scale that is not learned resizes the image to that square instead.

    Shape:
        - Input: ``(B, C, image_size, image_size)``; one channel is repeated to ``channels``.
        - Output: ``(B, channels, out_size, out_size)`` and the side of the occupied square.

    Args:
        image_size: Side :math:`d_0` of the image in pixels, at scale 1.
        out_size: Side :math:`S` of the canvas, what the network takes.
        channels: Channels that the network takes.
        init: Scale at first.
        bounds: What the scale is kept within.
        trainable: Whether it is learned.

    Attributes:
        scale: The scale, a scalar.

    Raises:
        ValueError: If the scale is outside its bounds, or the image is larger than the canvas.

    Example:
        >>> scale = LearnableScale(image_size=4, out_size=8, channels=1, init=0.5, trainable=False)
        >>> canvas, side = scale(torch.ones(1, 1, 4, 4))
        >>> side, int(canvas.sum())
        (2, 4)

    """

    def __init__(
        self,
        image_size: int = 128,
        out_size: int = 224,
        channels: int = 3,
        init: float = 1.0,
        bounds: Sequence[float] = (0.1, 5.0),
        trainable: bool = True,
    ) -> None:
        super().__init__()
        low, high = bounds
        if not 0.0 < low <= init <= high:
            raise ValueError(
                f"Expected argument `init` to be within bounds={tuple(bounds)}, which are above zero, but got {init}."
            )
        if not 0 < image_size <= out_size:
            raise ValueError(
                f"Expected argument `image_size` to be in 1, ..., out_size={out_size}, but got {image_size}."
            )
        self.save_hyperparameters()
        self.image_size = image_size
        self.out_size = out_size
        self.channels = channels
        self.bounds = (float(low), float(high))
        self.scale = nn.Parameter(torch.tensor(float(init)), requires_grad=trainable)

    @property
    def trainable(self) -> bool:
        """Whether the scale is learned."""
        return "trainable" in self.hparams and bool(self.hparams["trainable"])

    @property
    def occupied(self) -> int:
        """Side of the square that the image takes, in pixels."""
        # 0.7 * 10 is 6.999...
        return max(1, min(int(self.image_size * float(self.scale.detach()) + 1e-6), self.out_size))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        """Images to canvases, and the side of the square that they take."""
        if x.ndim != 4 or tuple(x.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"Expected images of shape (B, C, {self.image_size}, {self.image_size}), but got {tuple(x.shape)}."
            )
        if x.shape[1] != self.channels:
            if x.shape[1] != 1:
                raise ValueError(f"Expected images of {self.channels} channels, or of one, but got {x.shape[1]}.")
            x = x.expand(-1, self.channels, -1, -1)
        with torch.no_grad():
            # a step may have led outside
            self.scale.clamp_(*self.bounds)
        side = self.occupied
        if not self.trainable:
            if side != self.image_size:
                x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=side < x.shape[-1])
            return self._centred(x), side
        canvas = self._centred(x)
        theta = torch.zeros(len(x), 2, 3, dtype=x.dtype, device=x.device)
        inverse = (1.0 / self.scale).to(x.dtype)
        theta = theta + inverse * torch.eye(2, 3, dtype=x.dtype, device=x.device)
        # pads above and left are one pixel larger where they differ: the middle of the image is the fixed point
        shift = (self.out_size - x.shape[-1]) % 2 / self.out_size
        offset = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=x.dtype, device=x.device) * shift
        grid = F.affine_grid(theta + offset * (1.0 - inverse), list(canvas.shape), align_corners=False)
        return F.grid_sample(canvas, grid, align_corners=False), side

    def _centred(self, x: Tensor) -> Tensor:
        before, after = frame_pads(x.shape[-1], self.out_size)
        return F.pad(x, (before, after, before, after))


class FramePrompt(Prompt):
    r"""A learned frame around an image that :class:`LearnableScale` places; it begins where the image ends.

    From "AutoVP: An Automated Visual Prompting Framework and Benchmark" (ICLR 2024).

    .. math:: x' = \frac{c + \sigma(\delta) \odot M - \mu}{s}

    with the canvas :math:`c` and :math:`M` one outside the square that the image takes; :math:`\sigma` is left out for
    CLIP, which gets prompts in its normalised space.

    Shape:
        - Input: ``(B, C, image_size, image_size)`` of the scale.
        - Output: ``(B, channels, out_size, out_size)`` of the scale.

    Args:
        scale: Places the images.
        squash: ``"sigmoid"`` keeps the frame in (0, 1); ``"none"`` leaves it as it is.
        init: ``"zero"`` or ``"randn"``.
        mean: What the network wants subtracted from each channel, after prompting.
        std: What it wants each channel divided by.

    Example:
        >>> prompt = FramePrompt(LearnableScale(image_size=2, out_size=4, channels=1))
        >>> prompt(torch.ones(1, 1, 2, 2))[0, 0, 0].tolist()
        [0.5, 0.5, 0.5, 0.5]

    """

    def __init__(
        self,
        scale: LearnableScale,
        squash: Literal["sigmoid", "none"] = "sigmoid",
        init: Literal["zero", "randn"] = "zero",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if squash not in ("sigmoid", "none"):
            raise ValueError(f"Expected argument `squash` to be 'sigmoid' or 'none', but got {squash!r}.")
        size = scale.out_size
        super().__init__((scale.channels, size, size), torch.ones(1), init, mean, std)
        self.save_hyperparameters(ignore=["scale"])
        self.scale = scale
        self.squash = squash

    def frame(self, side: int) -> Tensor:
        """One outside the square that an image takes, zero inside, shape ``(out_size, out_size)``."""
        before, _ = frame_pads(side, self.scale.out_size)
        mask = torch.ones_like(self.delta[0])
        mask[before : before + side, before : before + side] = 0.0
        return mask

    @torch.no_grad()
    def pattern(self) -> Tensor:
        """The frame as it stands around an image of the present scale."""
        delta = self.delta.sigmoid() if self.squash == "sigmoid" else self.delta
        return delta * self.frame(self.scale.occupied)

    def forward(self, x: Tensor) -> Tensor:
        """Images to framed images."""
        canvas, side = self.scale(x)
        mask = self.frame(side)
        delta = self.delta.sigmoid() if self.squash == "sigmoid" else self.delta
        return self.normalized(canvas + delta * mask)


def frame_pads(side: int, out_size: int) -> tuple[int, int]:
    """Pixels before and after an image of a side in the middle of a canvas: one more before it where they differ."""
    before = (out_size - side + 1) // 2
    return before, out_size - side - before
