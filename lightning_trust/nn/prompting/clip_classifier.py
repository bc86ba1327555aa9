"""CLIP as a classifier whose outputs are texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trust.core.host import close_names
from lightning_trust.nn.prompting.clip_templates import CLIP_TEMPLATES_81
from lightning_trust.nn.prompting.open_clip_models import Tokenizer
from lightning_trust.nn.prompting.text_encoder import ClipTextEncoder, class_texts


class ClipClassifier(nn.Module):
    r"""A frozen CLIP model as a classifier: every class in every template is an output.

    "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020; with a bank of
    templates, "Understanding and Improving Visual Prompting: A Label-Mapping Perspective", CVPR 2023,
    arXiv:2211.11635. With the embeddings :math:`f_I` of images and :math:`e_j` of texts, all of length 1, and the
    model's scale :math:`\tau`,

    .. math:: z_j(x) = \exp(\tau) \, \langle f_I(x), e_j \rangle, \qquad j = t K_t + k

    for template :math:`t` of :math:`T` and class :math:`k` of :math:`K_t`: :math:`K_s = T K_t` source classes, whose
    names are the texts. A label mapping then chooses which text stands for which class. A model with a bias of its
    logits adds it.

    All parameters, the scale among them, are frozen, and the model stays in eval mode whatever ``train`` says.
    Gradients reach the images. The embeddings are computed once and kept in the buffer ``bank``.

    Shape:
        - Input: images ``(B, 3, H, W)``, normalised as the model wants them.
        - Output: ``(B, T * K_t)``.

    Args:
        clip_model: A model with ``encode_image``, ``encode_text`` and ``logit_scale``, as open_clip makes them (see
            :func:`~lightning_trust.nn.create_clip`).
        tokenizer: Texts -> tokens, int64 ``(N, L)``.
        class_names: Names of the target classes; they are put in lower case, ``_`` and ``-`` become spaces.
        templates: Texts with one slot ``{}``; by default the plain one and the eighty published ones.
        batch_size: Texts that are encoded together.

    Attributes:
        bank: Embeddings of the texts, ``(T * K_t, D)``, template-major.
        texts: The texts.
        templates: The templates.
        class_names: Names of the target classes, as given.

    Raises:
        ValueError: If there are no classes or templates, a name is empty, a template has not one slot, a text does not
            fit into the context of the model, or images are no ``(B, 3, H, W)`` of the model's size.

    Example:
        >>> import torch
        >>> from lightning_trust.nn import create_clip
        >>> config = {
        ...     "embed_dim": 8,
        ...     "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
        ...     "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
        ... }
        >>> model = ClipClassifier(*create_clip(config=config), ["Bag", "Ankle_boot"])
        >>> images = torch.rand(4, 3, 28, 28)
        >>> model(images).shape, model.zero_shot(images).shape
        (torch.Size([4, 162]), torch.Size([4, 2]))
        >>> model.texts[:3]
        ('This is a photo of a bag.', 'This is a photo of a ankle boot.', 'a bad photo of a bag.')

    """

    bank: Tensor

    def __init__(
        self,
        clip_model: nn.Module,
        tokenizer: Tokenizer,
        class_names: Sequence[str],
        templates: Sequence[str] = CLIP_TEMPLATES_81,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        self.texts = class_texts(class_names, templates)
        self.class_names = tuple(class_names)
        self.templates = tuple(templates)
        self.clip: Any = clip_model.requires_grad_(False).eval()
        self.register_buffer("bank", ClipTextEncoder(clip_model, tokenizer, batch_size)(self.texts))

    @property
    def num_source(self) -> int:
        """Number of outputs, ``T * K_t``."""
        return len(self.texts)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the outputs: the texts."""
        return self.texts

    def train(self, mode: bool = True) -> ClipClassifier:
        """Set the mode of this module; that of the model inside stays eval."""
        super().train(mode)
        self.clip.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` -> the logits of all texts, ``(B, T * K_t)``."""
        return self._logits(x, self.bank)

    def zero_shot(self, x: Tensor, template: int | str | None = None) -> Tensor:
        r"""Images ``(B, 3, H, W)`` -> the logits of the classes ``(B, K_t)``, with nothing learned.

        Args:
            x: The images.
            template: One of the templates, or its place. If None, a class has the mean of its texts' embeddings over
                all templates, brought to length 1, as CLIP's authors classify ImageNet.

        Raises:
            ValueError: If there is no such template.

        """
        if isinstance(template, str):
            if template not in self.templates:
                raise ValueError(
                    f"Expected argument `template` to be one of the {len(self.templates)} templates, but got"
                    f" {template!r}. Close names: {close_names(template, list(self.templates))}."
                )
            template = self.templates.index(template)
        bank = self.bank.unflatten(0, (len(self.templates), len(self.class_names)))
        if template is None:
            return self._logits(x, F.normalize(bank.mean(dim=0), dim=-1))
        if not 0 <= template < len(self.templates):
            raise ValueError(
                f"Expected argument `template` to be in [0, {len(self.templates) - 1}], but got {template}."
            )
        return self._logits(x, bank[template])

    def embed_images(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` -> embeddings of length 1, ``(B, D)``."""
        size = getattr(self.clip.visual, "image_size", None)
        height, width = (size, size) if isinstance(size, int) else tuple(size or x.shape[-2:])
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, height, width):
            raise ValueError(
                f"Expected images of shape (B, 3, {height}, {width}), as the CLIP model takes them,"
                f" but got {tuple(x.shape)}."
            )
        return F.normalize(self.clip.encode_image(x), dim=-1)

    def _logits(self, x: Tensor, bank: Tensor) -> Tensor:
        logits: Tensor = self.clip.logit_scale.exp() * (self.embed_images(x) @ bank.T)
        bias = getattr(self.clip, "logit_bias", None)
        return logits if bias is None else logits + bias
