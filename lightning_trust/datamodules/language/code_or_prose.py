"""Whether a passage of Python's standard library is code or prose."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from lightning_trust.datamodules.language.prompted_text import PromptedText
from lightning_trust.datamodules.language.python_sources import files_of, read_source, source_files
from lightning_trust.datamodules.language.text_rows import Part
from lightning_trust.datamodules.split_data_module import check_integer

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class CodeOrProse(PromptedText):
    r"""Classification that needs no download: whether a passage of Python's standard library is code or prose.

    A row is a passage, ``"\n# This is"`` and the word of its class, `` code`` or `` prose``: the model is to say the
    word. Prose is what docstrings say, code is all else but comments; every line break and indentation is a blank in
    both. Files, not passages, are split into training, validation and test, and both classes have as many rows. What
    the sources say depends on the version of the running interpreter.

    Args:
        packages: Packages of the library to be read; all of it if None.
        characters: Length of a passage.
        template: What is around a text, with ``{text}`` for it.
        sources: A folder of Python files to be read in place of the standard library.
        tokenizer: ``"bytes"``, 258 tokens; or the name of a tokenizer on the hub of Hugging Face, or a folder.
        max_length: Largest number of tokens of a row; a text is cut at its end to fit in.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader.
        train_rows: How many training rows to keep; None for all.
        val_rows: How many validation rows to keep; None for all.
        test_rows: How many test rows to keep; None for all.
        seed: Seed of the split and of the choice of rows.

    Raises:
        ValueError: If a number is out of its range, or a package has no files (in ``setup``).
        SyntaxError: If a file is no Python of the running version.
        MisconfigurationException: If more rows are asked for than there are.
        ModuleNotFoundError: If the tokenizer needs a library that is missing.

    Example:
        >>> data = CodeOrProse(packages=["json", "email"], train_rows=8, val_rows=4, test_rows=4)
        >>> data.setup()
        >>> row = data.train_dataset[0]["input_ids"]
        >>> data.tokenizer.decode(row.tolist())[-11:], data.tokenizer.decode(data.train_dataset.candidates.tolist())
        ('# This is c', 'cp')

    """

    def __init__(
        self,
        packages: Sequence[str] | None = ("asyncio", "email", "http", "importlib", "logging", "unittest", "xml"),
        characters: int = 64,
        template: str = "{text}\n# This is",
        sources: str | None = None,
        tokenizer: str = "bytes",
        max_length: int = 96,
        batch_size: int = 16,
        num_workers: int = 0,
        train_rows: int | None = 2000,
        val_rows: int | None = 200,
        test_rows: int | None = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(
            template,
            (" code", " prose"),
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
        if packages is not None and not packages:
            raise ValueError("Expected argument `packages` to name one, or to be None, but got [].")
        self.packages = packages
        self.characters = characters
        self.sources = sources

    def texts(self, part: Part) -> list[tuple[str, int]]:
        """All passages of a part: 0 for code, 1 for prose."""
        files = {}
        for package in self.packages or (None,):
            files.update(source_files(self.sources, package))
        found = []
        for path in files_of(part, files, self.seed):
            for label, text in enumerate(code_and_prose(read_source(path))):
                found += [(passage, label) for passage in passages(text, self.characters)]
        return found


def code_and_prose(source: str) -> tuple[str, str]:
    r"""What a source does, without comments, and what its docstrings say; on one line each.

    Example:
        >>> code_and_prose('def f(x):\n    "Twice a  number."\n    return 2 * x  # fast\n')
        ('def f(x): return 2 * x', 'Twice a number.')

    """
    tree = ast.parse(source)
    prose = []
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (said := ast.get_docstring(node)) is not None:
            prose.append(said)
            node.body = node.body[1:] or [ast.Pass()]
    return " ".join(ast.unparse(tree).split()), " ".join(" ".join(prose).split())


def passages(text: str, characters: int) -> list[str]:
    """Passages of a length that follow one another and begin with a word; what is left at the end is dropped.

    Example:
        >>> passages("one two three four", 6)
        ['one tw', 'three ']

    """
    found, start = [], 0
    while start + characters <= len(text):
        end = start + characters
        found.append(text[start:end])
        start = text.find(" ", end) + 1 or len(text)
    return found
