"""Tokenizers: bytes, which need nothing, and those of the hub by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lightning_trust.nn.language.libraries import language_library


class Tokenizer(Protocol):
    """What this package asks of a tokenizer; those of transformers have it."""

    @property
    def pad_token_id(self) -> int | None:
        """What fills a row up; None where there is no such token."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The end of a text; None where there is no such token."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to tokens, with those at the beginning and the end of a text if asked for."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens to text."""
        ...

    def __len__(self) -> int: ...


class ByteTokenizer:
    """The bytes of a text in UTF-8 are its tokens, 0 to 255; then come padding, 256, and the end of a text, 257.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né")
        [110, 195, 169]
        >>> tokenizer.decode([110, 195, 169, 257]), len(tokenizer)
        ('né', 258)

    """

    pad_token_id = 256
    eos_token_id = 257

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to bytes; there are no special tokens around it."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Bytes to text; what is no byte is left out."""
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")

    def __len__(self) -> int:
        return 258


def make_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: ``"bytes"``, or the name of one on the hub of Hugging Face, or a folder.

    Raises:
        ModuleNotFoundError: If transformers is missing; the error names the extra.

    """
    if name == "bytes":
        return ByteTokenizer()
    made: Any = language_library("transformers", f"The tokenizer '{name}'").AutoTokenizer.from_pretrained(name)
    return made
