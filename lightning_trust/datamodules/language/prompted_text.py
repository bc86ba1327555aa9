"""Classification by a language model: a prompt, and words that stand for the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_trust.datamodules.language.text_rows import Part, TextDataModule, TokenRows


class PromptedText(TextDataModule):
    """Texts and their classes as rows that end with the word of the class; a subclass reads them.

    The words are told apart by the first token that not all of them begin with, which is the last of a row and the only
    one that has a label. ``candidates`` of a batch holds that token of every class.

    Args:
        template: What is around a text, with ``{text}`` for it.
        words: The words of the classes, with the blank before them where one is to be there.
        tokenizer: See :func:`~lightning_trust.datamodules.language.tokenizers.make_tokenizer`.
        max_length: Largest number of tokens of a row; a text is cut at its end to fit in.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        train_rows: How many training rows to keep, as many of each class; None for all.
        val_rows: How many validation rows.
        test_rows: How many test rows.
        seed: Seed of the choice of rows.

    Raises:
        ValueError: If the template has no ``{text}``, there are no two words, two have the same token, or the template
            leaves no room for a text.

    """

    def __init__(
        self,
        template: str,
        words: Sequence[str],
        tokenizer: str,
        max_length: int,
        batch_size: int,
        num_workers: int,
        train_rows: int | None,
        val_rows: int | None,
        test_rows: int | None,
        seed: int,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers, train_rows, val_rows, test_rows, seed)
        if template.count("{text}") != 1:
            raise ValueError(f"Expected argument `template` to have '{{text}}' once, but got {template!r}.")
        if len(words) < 2:
            raise ValueError(f"Expected argument `words` to hold a word for each of two classes, but got {words!r}.")
        self.template = template
        self.words = list(words)

    def texts(self, part: Part) -> list[tuple[str, int]]:
        """All texts of a part with their classes."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.words)

    def read(self, part: Part) -> TokenRows:
        """All rows of a part."""
        before, after = self.template.split("{text}")
        head = self.tokenizer.encode(before)
        shared, candidates = self._verbalized()
        tail = [*self.tokenizer.encode(after, add_special_tokens=False), *shared]
        room = self.max_length - len(head) - len(tail) - 1
        if room < 1:
            raise ValueError(
                f"Expected argument `max_length` to leave room for a text beside the {len(head) + len(tail) + 1} tokens"
                f" of the template and a word, but got {self.max_length}."
            )
        rows, targets = [], []
        for text, label in self.texts(part):
            body = self.tokenizer.encode(text, add_special_tokens=False)[:room]
            rows.append(torch.tensor([*head, *body, *tail, candidates[label]], dtype=torch.int32))
            targets.append(label)
        return TokenRows(rows, torch.tensor(targets), torch.tensor(candidates))

    def _verbalized(self) -> tuple[list[int], list[int]]:
        """The tokens that all words begin with, and the next one of each."""
        encoded = [self.tokenizer.encode(word, add_special_tokens=False) for word in self.words]
        shared = 0
        while all(len(each) > shared + 1 for each in encoded) and len({each[shared] for each in encoded}) == 1:
            shared += 1
        following = [each[shared] if len(each) > shared else None for each in encoded]
        found = [token for token in following if token is not None]
        if len(set(found)) < len(self.words):
            raise ValueError(
                "Expected argument `words` to be told apart by the first token that not all begin with, but got"
                f" {dict(zip(self.words, following, strict=True))}. Choose other words."
            )
        return encoded[0][:shared], found
