"""The entry point: which command was asked for; what is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_trust import __version__
from lightning_trust.catalog import FAMILIES, METHODS, MethodEntry, method, methods

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_trust.cli.training import TrainingCLI

_TRAINING = {
    "fit": "train, prune, unlearn: run the whole optimisation of a configuration",
    "validate": "one evaluation over the validation set",
    "test": "one evaluation over the test set",
    "predict": "predictions for a data set",
}
_OWN = {
    "methods": "list the methods of the package, or show one",
    "report": "compare finished runs: tables here, and one HTML page",
    "run": "run the stages of a recipe; finished stages are skipped",
}
_HELP = """\
Trustworthy machine learning on an unchanged LightningModule.

usage: lightning-trust COMMAND [arguments]

{commands}

examples:
  lightning-trust fit --config mine.yaml                                 # your run as it is
  lightning-trust fit --config mine.yaml --config salun.overlay.yaml     # the same, and it forgets
  lightning-trust methods --family unlearning
  lightning-trust report runs/ --output report.html

`lightning-trust COMMAND --help` explains a command. In configurations the classes of lightning_trust go by their
short names (SalUn); yours go by their import paths (my_package.MyModel).
"""


def main(args: Sequence[str] | None = None) -> TrainingCLI | None:
    """Run the command line ``lightning-trust``.

    Args:
        args: The command line, without the program's name; by default that of the process.

    Returns:
        Called from Python with ``fit``, ``validate``, ``test`` or ``predict``: the finished run with its ``trainer``,
        ``model`` and ``datamodule``. Else ``None``.

    Raises:
        SystemExit: On the command line of the process, for arguments that are wrong.
        ValueError: Called from Python, for the same; see also the functions behind the commands.

    """
    console = args is None
    result = _run(list(sys.argv[1:] if args is None else args), console)
    # a console script ends with sys.exit(main()), for which any object is a failure
    return None if console else result


def _run(args: list[str], console: bool) -> TrainingCLI | None:
    command = args[0] if args else "--help"
    if command in {"-h", "--help", "help"}:
        print(_help_text(), end="")
    elif command == "--version":
        print(f"lightning-trust {__version__}")
    elif command == "methods":
        with _in_words(console):
            _methods(args[1:])
    elif command == "report":
        with _in_words(console):
            _report(args[1:])
    elif command == "run":
        _recipe(args[1:], console)
    elif command in _TRAINING or command.startswith("-"):
        with _in_words(console):
            from lightning_trust.cli.configs import check_order

            check_order(args)
        from lightning_trust.cli.training import train

        return train(args)
    else:
        names = [*_TRAINING, *_OWN]
        close = difflib.get_close_matches(command, names)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else f" There are: {', '.join(names)}."
        with _in_words(console):
            raise ValueError(f"Expected a command of lightning-trust, but got {command!r}.{hint}")
    return None


def _help_text() -> str:
    width = max(map(len, [*_TRAINING, *_OWN])) + 2
    groups = [("training, through LightningCLI:", _TRAINING), ("around it:", _OWN)]
    lines = []
    for title, commands in groups:
        lines += [title, *(f"  {name:{width}}{text}" for name, text in commands.items()), ""]
    return _HELP.format(commands="\n".join(lines).rstrip())


@contextlib.contextmanager
def _in_words(console: bool) -> Iterator[None]:
    """On the command line a wrong argument ends in one sentence, without the traceback that a caller in Python gets."""
    try:
        yield
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError, ModuleNotFoundError))
        # known by its name: importing Lightning's class would cost seconds in commands that do without Lightning
        if not console or not (expected or type(error).__name__ == "MisconfigurationException"):
            raise
        print(f"lightning-trust: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser(command: str, **options: Any) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"lightning-trust {command}", allow_abbrev=False, **options)


def _methods(args: list[str]) -> None:
    parser = _parser("methods", description="List the methods of the package, or show one.")
    parser.add_argument("name", nargs="?", help="a method, by its name or by a class of it; all by default")
    parser.add_argument("--family", help=f"one of: {', '.join(FAMILIES)}")
    parsed = parser.parse_args(args)
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if parsed.name is not None:
        console.print(_method_table(method(parsed.name)))
        return
    entries = methods(parsed.family)
    if not entries:
        present = ", ".join(dict.fromkeys(entry.family for entry in METHODS))
        console.print(f"No method of the family {parsed.family} yet. There are methods of: {present}.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("Method", no_wrap=True, style="bold")
    table.add_column("What it does, and its classes", overflow="fold")
    for family in dict.fromkeys(entry.family for entry in entries):
        table.add_row(Text(family, style="not bold dim"), "")
        for entry in methods(family):
            # a narrow terminal breaks between names
            names = ", ".join(path.rpartition(".")[2] for path in entry.classes)
            table.add_row(f"  {entry.name}", Text(f"{entry.title}\n").append(names, style="dim"))
    console.print(table)
    console.print(Text("Paper, configurations and documentation of one: lightning-trust methods NAME", style="dim"))


def _method_table(entry: MethodEntry) -> Table:
    from rich.table import Table

    table = Table(
        title=entry.name, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("What it does", entry.title)
    table.add_row("Family", entry.family)
    table.add_row("Classes", "\n".join(entry.classes))
    table.add_row("Papers", "\n".join(f"{paper.title}. {paper.venue}" for paper in entry.papers))
    table.add_row("Small run", entry.config)
    table.add_row("Paper's run", entry.paper_config)
    table.add_row("Overlay", entry.overlay_config)
    table.add_row("Documentation", entry.docs)
    table.add_row("Results", entry.results)
    return table


def _report(args: list[str]) -> None:
    parser = _parser("report", description="Compare finished runs: tables here, and one HTML page.")
    parser.add_argument("paths", nargs="+", help="run folders (searched at any depth), run.json files, or globs")
    parser.add_argument("--output", default="report.html", help="where the page shall stand (default: %(default)s)")
    parser.add_argument("--markdown", help="also write the tables as Markdown to this file")
    parsed = parser.parse_args(args)
    from rich.console import Console

    from lightning_trust.core.files import write_text
    from lightning_trust.report import collect, markdown, print_collection, robust_markdown, write_page

    collection = collect(parsed.paths)
    console = Console()
    print_collection(collection, console)
    if parsed.markdown is not None:
        tables = [markdown(scenario) for scenario in collection.scenarios]
        if collection.robust:
            tables.append(robust_markdown(collection.robust))
        write_text(parsed.markdown, "\n".join(tables))
        console.print(f"Markdown: {parsed.markdown}", soft_wrap=True, markup=False)
    path = write_page(collection, parsed.output)
    console.print(f"Page: {path}", soft_wrap=True, markup=False)


def _recipe(args: list[str], console: bool) -> None:
    parser = _parser(
        "run",
        description="Run the stages of a recipe in order. A finished stage is skipped until its configuration, or a"
        " stage that it needs, changes.",
    )
    parser.add_argument("recipe", help="YAML file with `stages`, and optionally `folder` and `variables`")
    parsed = parser.parse_args(args)
    # before rich, as in a plain LightningCLI: the first `Union[float, int]` of a process decides how all others read,
    # and with rich's a user's own `Union[int, float]` argument would make 1.0 of 1
    import lightning.pytorch  # noqa: F401

    from lightning_trust.recipes import Recipe

    with _in_words(console):
        recipe = Recipe.read(parsed.recipe)
    with _quiet():
        recipe.run(main)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning would remark in every stage anew; its warnings stay."""
    # where the older package is imported as well, the remarks of both go to its logger
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6's own call of torch, which nobody who reads this can change
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
