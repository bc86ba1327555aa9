"""Which package of Python's standard library a passage comes from."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_trust.datamodules.language.prompted_text import PromptedText
from lightning_trust.datamodules.language.python_sources import files_of, read_source, source_files
from lightning_trust.datamodules.language.text_rows import Part, check_integer


class CodeOrigin(PromptedText):
    r"""Classification that needs no download: which package of Python's standard library a passage of code comes from.

    A row is a passage, ``"\n# from"`` and the word of its package: the model is to say the word. Passages are whole
    lines of about ``characters`` characters that follow one another; those that name one of the packages are left out.
    Files, not passages, are split into training, validation and test, and all packages have as many rows.

    Args:
        packages: The packages, which are the classes.
        characters: Length of a passage.
        template: What is around a text, with ``{text}`` for it.
        root: A folder of Python packages to be read in place of the standard library.
        tokenizer: ``"bytes"``, 258 tokens; or the name of a tokenizer on the hub of Hugging Face, or a folder.
        max_length: Largest number of tokens of a row; a text is cut at its end to fit in.
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
        >>> data = CodeOrigin(packages=["asyncio", "email"], train_rows=8, val_rows=4, test_rows=4)
        >>> data.setup()
        >>> row = data.train_dataset[0]["input_ids"]
        >>> data.tokenizer.decode(row.tolist())[-8:], data.tokenizer.decode(data.train_dataset.candidates.tolist())
        ('# from a', 'ae')

    """

    def __init__(
        self,
        packages: Sequence[str] = ("asyncio", "email", "multiprocessing", "xml"),
        characters: int = 96,
        template: str = "{text}\n# from",
        root: str | None = None,
        tokenizer: str = "bytes",
        max_length: int = 128,
        batch_size: int = 16,
        num_workers: int = 0,
        train_rows: int | None = 2000,
        val_rows: int | None = 200,
        test_rows: int | None = 400,
        seed: int = 0,
    ) -> None:
        super().__init__(
            template,
            [f" {package}" for package in packages],
            tokenizer,
            max_length,
            batch_size,
            num_workers,
            train_rows,
            val_rows,
            test_rows,
            seed,
        )
        check_integer("characters", characters, 1)
        self.packages = packages
        self.characters = characters
        self.root = root

    def texts(self, part: Part) -> list[tuple[str, int]]:
        """All passages of a part with the places of their packages."""
        found = []
        for label, package in enumerate(self.packages):
            files = source_files(self.root, package)
            for path in files_of(part, files, self.seed):
                found += [(text, label) for text in passages(read_source(path), self.characters)]
        known = [package.lower() for package in self.packages]
        return [(text, label) for text, label in found if not any(package in text.lower() for package in known)]


def passages(source: str, characters: int) -> list[str]:
    r"""Passages of whole lines, blank ones left out, each cut to a length.

    Example:
        >>> passages("a = 1\n\nb = 2\nc = 3\n", 9)
        ['a = 1\nb =']

    """
    found, held = [], ""
    for line in source.splitlines():
        if not line.strip():
            continue
        held = f"{held}\n{line.rstrip()}" if held else line.rstrip()
        if len(held) >= characters:
            found.append(held[:characters])
            held = ""
    return found
