"""Next-token data from Python's standard library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lightning_trust.datamodules.language.python_sources import files_of, read_source, source_files
from lightning_trust.datamodules.language.text_rows import Part, TextDataModule, TokenRows


class CodeCorpus(TextDataModule):
    """Sources of Python's standard library for the prediction of the next token: real text that is always there.

    Rows are ``max_length`` tokens that follow one another in a file or in the next, with the end of a text between two
    files; every token has a label. Which files are for training, validation and test depends on their names and on
    ``seed`` alone. What the sources say depends on the version of the running interpreter.

    Args:
        packages: Packages of the library to be read, such as ``["json", "email"]``; all of it if None.
        sources: A folder of Python files to be read in its place.
        tokenizer: ``"bytes"``, 258 tokens; or the name of a tokenizer on the hub of Hugging Face, or a folder.
        max_length: Tokens of a row.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        train_rows: How many training rows to keep; None for all.
        val_rows: How many validation rows to keep; None for all.
        test_rows: How many test rows to keep; None for all.
        seed: Seed of the split and of the choice of rows.

    Raises:
        ValueError: If a number is out of its range, or a package has no files.
        MisconfigurationException: If more rows are asked for than there are.
        ModuleNotFoundError: If the tokenizer needs a library that is missing.

    Example:
        >>> data = CodeCorpus(packages=["json", "email"], max_length=32, batch_size=4)
        >>> data.setup()
        >>> batch = next(iter(data.val_dataloader()))
        >>> batch["input_ids"].shape, bool((batch["labels"] == batch["input_ids"]).all()), data.vocabulary
        (torch.Size([4, 32]), True, 258)

    """

    def __init__(
        self,
        packages: Sequence[str] | None = None,
        sources: str | None = None,
        tokenizer: str = "bytes",
        max_length: int = 128,
        batch_size: int = 16,
        num_workers: int = 0,
        train_rows: int | None = None,
        val_rows: int | None = 200,
        test_rows: int | None = 200,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length, batch_size, num_workers, train_rows, val_rows, test_rows, seed)
        if packages is not None and not packages:
            raise ValueError("Expected argument `packages` to name one, or to be None, but got [].")
        self.packages = packages
        self.sources = sources

    def read(self, part: Part) -> TokenRows:
        """All rows of a part."""
        files = {}
        for package in self.packages or (None,):
            files.update(source_files(self.sources, package))
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        encoded = [
            np.asarray([*self.tokenizer.encode(read_source(path), add_special_tokens=False), *end], dtype=np.int32)
            for path in files_of(part, files, self.seed)
        ]
        tokens = torch.from_numpy(np.concatenate(encoded))
        count = len(tokens) // self.max_length
        return TokenRows(tokens[: count * self.max_length].view(-1, self.max_length))
