"""Texts of classes, and what turns texts into embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trust.core.modes import eval_mode
from lightning_trust.nn.prompting.open_clip_models import Tokenizer, create_clip, load_open_clip


@runtime_checkable
class TextEncoder(Protocol):
    """What turns names into embeddings, such as :class:`ClipTextEncoder`; any function will do.

    Called with a sequence of :math:`N` texts, gives float ``(N, D)`` with rows of length 1, in the same order; equal
    texts have equal rows.
    """

    def __call__(self, names: Sequence[str]) -> Tensor:
        """Texts -> embeddings of length 1, ``(N, D)``."""
        ...


def clean_class_name(name: str) -> str:
    """A class name as texts have it: in lower case, ``_`` and ``-`` become spaces.

    Raises:
        ValueError: If nothing is left.

    Example:
        >>> clean_class_name("Ankle_boot"), clean_class_name("T-shirt/top")
        ('ankle boot', 't shirt/top')

    """
    cleaned = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    if not cleaned:
        raise ValueError(f"Expected argument `class_names` to hold names with a letter or digit, but got {name!r}.")
    return cleaned


def class_texts(class_names: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    """Every class in every template, template-major: text ``t * K + k`` is class ``k`` in template ``t``.

    Raises:
        ValueError: If there are no classes or templates, a name is empty, or a template has not one slot ``{}``.

    Example:
        >>> class_texts(["Bag", "Ankle_boot"], ["a {}.", "the {}."])
        ('a bag.', 'a ankle boot.', 'the bag.', 'the ankle boot.')

    """
    for argument, values in (("class_names", class_names), ("templates", templates)):
        if isinstance(values, str) or not len(values):
            raise ValueError(f"Expected argument `{argument}` to be a list of at least one text, but got {values!r}.")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                "Expected every text of argument `templates` to have one slot '{}' for the name of a class,"
                f" but got {template!r}."
            )
    names = [clean_class_name(name) for name in class_names]
    # not `str.format`: names and templates may have braces of their own
    return tuple(template.replace("{}", name) for template in templates for name in names)


class ClipTextEncoder(nn.Module):
    r"""The text tower of a CLIP model as a function: texts to embeddings of length 1.

    "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020:
    :math:`e(s) = f_T(s) / \lVert f_T(s) \rVert_2`. The texts are taken as they are; there is no gradient, and the
    model is in eval mode meanwhile.

    Args:
        model: A CLIP model with ``encode_text``, as open_clip makes them; or the name of one, for
            :func:`~lightning_trust.nn.create_clip`.
        tokenizer: Texts -> tokens, int64 ``(N, L)``; only beside a model that is no name.
        batch_size: Texts that are encoded together.

    Raises:
        ValueError: If the tokenizer is missing or one too many; when called, if there are no texts, a text does not
            fit into the context of the model, or an embedding is zero or not finite.

    Example:
        >>> config = {
        ...     "embed_dim": 8,
        ...     "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
        ...     "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
        ... }
        >>> encoder = ClipTextEncoder(*create_clip(config=config))
        >>> embeddings = encoder(["goldfish", "aquarium fish"])
        >>> embeddings.shape, bool((embeddings.norm(dim=1) - 1.0).abs().max() < 1e-6)
        (torch.Size([2, 8]), True)

    """

    def __init__(
        self, model: str | nn.Module = "ViT-B-32/openai", tokenizer: Tokenizer | None = None, batch_size: int = 256
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be a positive integer, but got {batch_size}.")
        if isinstance(model, str) and tokenizer is None:
            made, tokenizer = create_clip(model)
        elif isinstance(model, str) or tokenizer is None:
            raise ValueError(
                "Expected argument `tokenizer` beside a model, and none beside the name of one, but got"
                f" model={model if isinstance(model, str) else type(model).__name__!r} and tokenizer={tokenizer!r}."
            )
        else:
            made = model
        self.model: Any = made
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @torch.no_grad()
    def forward(self, names: Sequence[str]) -> Tensor:
        """Texts -> embeddings of length 1, float32 ``(N, D)``."""
        if isinstance(names, str) or not len(names):
            raise ValueError(f"Expected argument `names` to be a list of at least one text, but got {names!r}.")
        tokens = tokenized(self.tokenizer, names)
        device = next(self.model.parameters()).device
        with eval_mode(self.model):
            parts = [self.model.encode_text(part.to(device)).float() for part in tokens.split(self.batch_size)]
        return unit_rows(torch.cat(parts), names)


def tokenized(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Texts -> tokens, int64 ``(N, L)``, where no text is cut.

    Raises:
        ValueError: If a text is longer than the context of the tokenizer.

    """
    texts = list(texts)
    if not isinstance(tokenizer, load_open_clip().SimpleTokenizer):
        return tokenizer(texts)
    # it cuts without a word what does not fit; one place more shows that
    length = tokenizer.context_length
    tokens: Tensor = tokenizer(texts, context_length=length + 1)
    if tokens[:, length].any():
        text = texts[int(tokens[:, length].ne(0).int().argmax())]
        raise ValueError(f"Expected texts of at most {length - 2} tokens, the context of the model, but got {text!r}.")
    return tokens[:, :length].contiguous()


def unit_rows(embeddings: Tensor, texts: Sequence[str]) -> Tensor:
    """Embeddings divided by their lengths.

    Raises:
        ValueError: If one is zero or not finite.

    """
    lengths = embeddings.norm(dim=-1)
    bad = ~(lengths > 0) | ~lengths.isfinite()
    if bad.any():
        text = texts[int(bad.int().argmax())]
        raise ValueError(
            "Expected the text encoder to give vectors with a direction,"
            f" but that of {text!r} has the length {float(lengths[bad][0])}."
        )
    return F.normalize(embeddings, dim=-1)
