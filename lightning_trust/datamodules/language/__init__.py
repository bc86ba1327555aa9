"""Text."""

from __future__ import annotations

from lightning_trust.datamodules.language.code_corpus import CodeCorpus
from lightning_trust.datamodules.language.code_or_prose import CodeOrProse
from lightning_trust.datamodules.language.labeled_text import LabeledText
from lightning_trust.datamodules.language.prompted_text import PromptedText
from lightning_trust.datamodules.language.text_rows import TextDataModule, TokenRows
from lightning_trust.datamodules.language.tokenizers import ByteTokenizer, make_tokenizer

__all__ = [
    "ByteTokenizer",
    "CodeCorpus",
    "CodeOrProse",
    "LabeledText",
    "PromptedText",
    "TextDataModule",
    "TokenRows",
    "make_tokenizer",
]
