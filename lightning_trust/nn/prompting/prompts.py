"""Patterns that are learned at the input of a frozen network: beside the image, on its rim, on a patch, all over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import Tensor, nn

Init = Literal["zero", "randn"]
Corner = Literal["tl", "tr", "bl", "br"]


class Prompt(nn.Module, HyperparametersMixin):
    """Base of prompts: a learned ``delta`` of the shape of one input, of which a mask is used.

    Args:
        shape: Shape of one input of the network.
        mask: Where the prompt is; broadcasts to ``shape``.
        init: ``"zero"`` or ``"randn"``.
        mean: Subtracted from every channel of what the prompt gives.
        std: What every channel is then divided by.

    Attributes:
        delta: The prompt, float, shape ``shape``; outside the mask it counts for nothing.

    """

    mask: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        mask: Tensor,
        init: Init = "zero",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if init not in ("zero", "randn"):
            raise ValueError(f"Expected argument `init` to be 'zero' or 'randn', but got {init!r}.")
        self.delta = nn.Parameter(torch.zeros(*shape) if init == "zero" else torch.randn(*shape))
        # what a constructor makes need not be saved
        self.register_buffer("mask", mask.expand(*shape).clone(), persistent=False)
        self.normalizes = mean is not None or std is not None
        for name, values, other in (("mean", mean, 0.0), ("std", std, 1.0)):
            given = [other] * shape[0] if values is None else list(values)
            if len(given) != shape[0]:
                raise ValueError(
                    f"Expected argument `{name}` to have {shape[0]} values, one a channel, but got {given}."
                )
            self.register_buffer(name, torch.tensor(given).view(-1, *[1] * (len(shape) - 1)), persistent=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of what counts of the prompt."""
        return int(self.mask.sum()) * self.delta.element_size()

    def normalized(self, x: Tensor) -> Tensor:
        """The input less ``mean`` over ``std``."""
        return (x - self.mean) / self.std if self.normalizes else x

    @torch.no_grad()
    def pattern(self) -> Tensor:
        """The prompt as it stands in an input, shape ``shape``; zero where there is none."""
        return self.delta * self.mask

    def check_input(self, x: Tensor, shape: Sequence[int]) -> None:
        """Refuse inputs of another shape.

        Raises:
            ValueError: With both shapes.

        """
        if tuple(x.shape[1:]) != tuple(shape):
            raise ValueError(
                f"Expected inputs of shape (B, {', '.join(map(str, shape))}) for this {type(self).__name__}, but got"
                f" {tuple(x.shape)}."
            )


class PadPrompt(Prompt):
    r"""A learned frame around an image, which lies in the middle of a larger canvas.

    From "Understanding and Improving Visual Prompting: A Label-Mapping Perspective" (CVPR 2023).

    .. math:: x' = \frac{\mathrm{pad}(x) + \sigma(\delta) \odot M - \mu}{s}

    with :math:`M` one on the frame and zero on the image. An untrained frame of zeros is mid-grey. Of a canvas of side
    :math:`S` and an image of side :math:`d`, :math:`\lfloor (S - d + 1)/2 \rfloor` rows lie above and as many columns
    left of the image.

    Shape:
        - Input: ``(B, channels, image_size, image_size)``, in [0, 1].
        - Output: ``(B, channels, out_size, out_size)``.

    Args:
        image_size: Side of the image in pixels.
        out_size: Side of the canvas, what the network takes.
        channels: Channels of image and canvas.
        init: ``"zero"`` or ``"randn"``.
        mean: What the network wants subtracted from each channel, after prompting.
        std: What it wants each channel divided by.

    Raises:
        ValueError: If the image is larger than the canvas, or an input has another shape.

    Example:
        >>> prompt = PadPrompt(image_size=2, out_size=4, channels=1)
        >>> prompt(torch.ones(1, 1, 2, 2))[0, 0].tolist()[:2]
        [[0.5, 0.5, 0.5, 0.5], [0.5, 1.0, 1.0, 0.5]]

    """

    def __init__(
        self,
        image_size: int,
        out_size: int = 224,
        channels: int = 3,
        init: Init = "zero",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if not 0 < image_size <= out_size:
            raise ValueError(
                f"Expected argument `image_size` to be in 1, ..., out_size={out_size}, but got {image_size}: the image"
                " lies inside the canvas."
            )
        before = (out_size - image_size + 1) // 2
        mask = torch.ones(1, out_size, out_size)
        mask[:, before : before + image_size, before : before + image_size] = 0.0
        super().__init__((channels, out_size, out_size), mask, init, mean, std)
        self.save_hyperparameters()
        self.shape = (channels, image_size, image_size)
        self.pad = (before, out_size - image_size - before)

    @torch.no_grad()
    def pattern(self) -> Tensor:
        """The frame as it stands around an image, in (0, 1)."""
        return self.delta.sigmoid() * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """Images to framed images."""
        self.check_input(x, self.shape)
        canvas = nn.functional.pad(x, (*self.pad, *self.pad))
        return self.normalized(canvas + self.delta.sigmoid() * self.mask)


class _AddedPrompt(Prompt):
    def forward(self, x: Tensor) -> Tensor:
        """Inputs plus the prompt."""
        self.check_input(x, self.delta.shape)
        return self.normalized(x + self.delta * self.mask)


class WatermarkPrompt(_AddedPrompt):
    r"""A learned frame that is added on top of an image: :math:`x' = x + \delta \odot M`.

    From "Exploring Visual Prompts for Adapting Large-Scale Models" (arXiv 2203.17274). The prompt is not squashed and
    knows no range; with CLIP it is added to images that are normalised already.

    Shape:
        - Input and output: ``(B, channels, size, size)``.

    Args:
        size: Side of the image in pixels.
        pad: Width of the frame in pixels.
        channels: Channels.
        init: ``"zero"`` or ``"randn"``.
        mean: Subtracted from each channel after prompting.
        std: What each channel is then divided by.

    Raises:
        ValueError: If the frame leaves nothing of the image.

    Example:
        >>> prompt = WatermarkPrompt(size=224, pad=30)
        >>> int(prompt.mask.sum())
        69840

    """

    def __init__(
        self,
        size: int = 224,
        pad: int = 30,
        channels: int = 3,
        init: Init = "zero",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if not (pad >= 1 and 2 * pad < size):
            raise ValueError(
                f"Expected argument `pad` to be at least 1 and 2 * pad below size={size}, but got pad={pad}."
            )
        mask = torch.ones(1, size, size)
        mask[:, pad:-pad, pad:-pad] = 0.0
        super().__init__((channels, size, size), mask, init, mean, std)
        self.save_hyperparameters()


class PatchPrompt(_AddedPrompt):
    r"""A learned square that is added to a corner of an image: :math:`x' = x + \delta \odot M`.

    The fixed patch of "Exploring Visual Prompts for Adapting Large-Scale Models" (arXiv 2203.17274).

    Shape:
        - Input and output: ``(B, channels, size, size)``.

    Args:
        size: Side of the image in pixels.
        patch: Side of the square in pixels.
        corner: ``"tl"``, ``"tr"``, ``"bl"`` or ``"br"``: top or bottom, left or right.
        channels: Channels.
        init: ``"zero"`` or ``"randn"``.
        mean: Subtracted from each channel after prompting.
        std: What each channel is then divided by.

    Raises:
        ValueError: If the patch is larger than the image, or nobody knows the corner.

    Example:
        >>> PatchPrompt(size=4, patch=2, corner="br", channels=1).mask[0, 2].tolist()
        [0.0, 0.0, 1.0, 1.0]

    """

    def __init__(
        self,
        size: int = 224,
        patch: int = 30,
        corner: Corner = "tl",
        channels: int = 3,
        init: Init = "zero",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if not 1 <= patch <= size:
            raise ValueError(f"Expected argument `patch` to be in 1, ..., size={size}, but got {patch}.")
        if corner not in ("tl", "tr", "bl", "br"):
            raise ValueError(f"Expected argument `corner` to be 'tl', 'tr', 'bl' or 'br', but got {corner!r}.")
        mask = torch.zeros(1, size, size)
        rows = slice(0, patch) if corner[0] == "t" else slice(size - patch, size)
        columns = slice(0, patch) if corner[1] == "l" else slice(size - patch, size)
        mask[:, rows, columns] = 1.0
        super().__init__((channels, size, size), mask, init, mean, std)
        self.save_hyperparameters()


class AdditivePrompt(_AddedPrompt):
    r"""A learned pattern that is added to all of an input, of whatever shape: :math:`x' = x + \delta`.

    Shape:
        - Input and output: ``(B, *shape)``.

    Args:
        shape: Shape of one input, such as ``(3, 224, 224)`` or ``(6,)``.
        init: ``"zero"`` or ``"randn"``.
        mean: Subtracted from each entry of the first dimension after prompting.
        std: What each is then divided by.

    Example:
        >>> AdditivePrompt((2,))(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.]], grad_fn=<AddBackward0>)

    """

    def __init__(
        self,
        shape: Sequence[int],
        init: Init = "zero",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(tuple(shape), torch.ones(1), init, mean, std)
        self.save_hyperparameters()
