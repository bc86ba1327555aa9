"""Labelled texts in files of a user's own."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_trust.datamodules.language.prompted_text import PromptedText
from lightning_trust.datamodules.language.text_rows import Part
from lightning_trust.datamodules.split_data_module import check_integer


class LabeledText(PromptedText):
    """Texts and labels in files of tab-separated values with a line of names on top, such as those of GLUE.

    As it comes it reads SST-2 of GLUE: ``sentence`` and ``label``, validation rows taken from ``train.tsv``, test rows
    from ``dev.tsv``, whose labels are public.

    Args:
        root: The folder of the files.
        train_file: File of the training and validation rows.
        test_file: File of the test rows.
        text: Name of the column of texts.
        label: Name of the column of labels, which count from 0.
        template: What is around a text, with ``{text}`` for it.
        words: The words of the labels, with the blank before them.
        tokenizer: Name of a tokenizer on the hub of Hugging Face, or a folder; or ``"bytes"``.
        max_length: Largest number of tokens of a row; a text is cut at its end to fit in.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        train_rows: How many training rows to keep, as many of each class; None for all.
        val_rows: How many of the rows of ``train_file`` are for validation.
        test_rows: How many test rows to keep, as many of each class; None for all.
        seed: Seed of the choice of rows.

    Raises:
        ValueError: If an argument is out of its range (at once), or a file has no such column or a label without a word
            (in ``setup``).
        FileNotFoundError: If a file is missing.
        MisconfigurationException: If more rows are asked for than there are.
        ModuleNotFoundError: If the tokenizer needs a library that is missing.

    Example:
        >>> LabeledText("data/SST-2", tokenizer="facebook/opt-125m").words
        [' terrible', ' great']

    """

    def __init__(
        self,
        root: str = "data",
        train_file: str = "train.tsv",
        test_file: str = "dev.tsv",
        text: str = "sentence",
        label: str = "label",
        template: str = "{text} It was",
        words: Sequence[str] = (" terrible", " great"),
        tokenizer: str = "bytes",
        max_length: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        train_rows: int | None = 1000,
        val_rows: int = 500,
        test_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            template, words, tokenizer, max_length, batch_size, num_workers, train_rows, val_rows, test_rows, seed
        )
        check_integer("val_rows", val_rows, 1)
        self.root = root
        self.files = {"train": train_file, "val": train_file, "test": test_file}
        self.text = text
        self.label = label
        self.val_rows = val_rows

    def texts(self, part: Part) -> list[tuple[str, int]]:
        """All texts of a part with their labels."""
        path = Path(self.root, self.files[part])
        if not path.is_file():
            raise FileNotFoundError(f"Expected {path} to be the file of the {part} rows, but there is none.")
        found = []
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = {self.text, self.label} - set(rows.fieldnames or ())
            if missing:
                raise ValueError(f"Expected {path} to have the columns {sorted(missing)}, but got {rows.fieldnames}.")
            for row in rows:
                value = row[self.label] or ""
                if not value.isdigit() or int(value) >= len(self.words):
                    raise ValueError(
                        f"Expected line {rows.line_num} of {path} to have a label from 0 to {len(self.words) - 1}, but"
                        f" got {value!r}."
                    )
                found.append((row[self.text] or "", int(value)))
        return found if part == "test" else self._of_train_file(part, found)

    def _of_train_file(self, part: Part, rows: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Validation rows, as many of each class as there can be, or the others."""
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        left = dict.fromkeys(range(self.num_classes), -(-self.val_rows // self.num_classes))
        held = set()
        for place in order:
            if left[rows[place][1]] > 0:
                left[rows[place][1]] -= 1
                held.add(place)
        return [row for place, row in enumerate(rows) if (place in held) == (part == "val")]
