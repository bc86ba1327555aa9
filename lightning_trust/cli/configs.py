"""Configuration files in an order that would lose something are refused before they are parsed.

Later files win. A later plain ``trainer.callbacks`` replaces the list of the files before it without a word, and hands
the arguments of an earlier callback to whichever one stands in its place; another class for ``model``, ``data`` or
``data_wrapper`` drops the arguments of the class before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import fsspec  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.utilities.exceptions import MisconfigurationException

SUBCOMMANDS = ("fit", "validate", "test", "predict")
_COMMAND_LINE = "the command line"
_CLASSES = ("model", "data", "data_wrapper")


@dataclass(frozen=True)
class _Source:
    """One file, or one argument on the command line, in the order of parsing."""

    name: str
    content: Mapping[str, Any]
    # before the subcommand, `callbacks+` of a second file replaces instead of appending
    before_subcommand: bool = False


def check_order(args: Sequence[str]) -> None:
    """Refuse an order of configuration files in which a later one silently drops what an earlier one asked for.

    Args:
        args: The command line, without the program's name.

    Raises:
        MisconfigurationException: If callbacks, or the arguments of a ``model``, ``data`` or ``data_wrapper`` class,
            would be lost; the error names the file, what it would lose, and the fix.

    """
    sources = _sources(args)
    _check_callbacks(sources)
    for key in _CLASSES:
        _check_class(sources, key)


def _check_callbacks(sources: Iterable[_Source]) -> None:
    found: list[tuple[_Source, str]] = []
    for source in sources:
        trainer = source.content.get("trainer")
        if not isinstance(trainer, Mapping):
            continue
        if "callbacks" in trainer:
            names = _class_names(trainer["callbacks"])
            on_purpose = source.name == _COMMAND_LINE and not names
            before = [name for _, name in found]
            if names[: len(before)] != before and not on_purpose:
                _refuse_list(source, found, names)
            found = [(source, name) for name in names]
        if "callbacks+" in trainer:
            if source.before_subcommand and found:
                raise MisconfigurationException(
                    f"{source.name} stands before the subcommand, where `callbacks+` replaces: it would lose"
                    f" {_listed(found)}. Give it after the subcommand: lightning-trust fit --config {source.name}"
                )
            found += [(source, name) for name in _class_names(trainer["callbacks+"])]


def _refuse_list(source: _Source, found: Sequence[tuple[_Source, str]], names: Sequence[str]) -> NoReturn:
    lost = [(each, name) for each, name in found if name not in names]
    what = f"would lose {_listed(lost)}" if lost else f"would mix up the arguments of {_listed(found)}"
    if source.name == _COMMAND_LINE:
        raise MisconfigurationException(
            f"`--trainer.callbacks` on the command line is a plain list after other callbacks, and {what}."
            " Append with `--trainer.callbacks+=` instead;"
            " to drop them on purpose, give `--trainer.callbacks=null` first."
        )
    raise MisconfigurationException(
        f"{source.name} gives `trainer.callbacks` as a plain list after other callbacks, and {what}."
        f" Put {source.name} first, or write `callbacks+:` in it."
    )


def _check_class(sources: Iterable[_Source], key: str) -> None:
    earlier: tuple[_Source, str] | None = None
    for source in sources:
        if key not in source.content or source.name == _COMMAND_LINE:
            continue
        names = _class_names(source.content[key])
        if earlier is not None and names[:1] != [earlier[1]]:
            if not names and source.content[key] is not None:
                continue  # arguments alone, for the class that an earlier file named
            hint = (
                " To change a data module without replacing it, wrap it: `data_wrapper:`."
                if key == "data"
                else " A run has one wrapper."
                if key == "data_wrapper"
                else ""
            )
            instead = names[0] if names else "null"
            raise MisconfigurationException(
                f"{source.name} gives `{key}: {instead}` after {earlier[0].name}, and would lose {earlier[1]} with its"
                f" arguments. Leave `{key}` out of one of the two files.{hint}"
            )
        if names:
            earlier = (source, names[0])


def _sources(args: Sequence[str]) -> list[_Source]:
    sources: list[_Source] = []
    subcommand = _subcommand(args)
    inside = False
    place = 0
    while place < len(args):
        argument = args[place]
        place += 1
        if not inside and argument == subcommand:
            inside = True
            continue
        if not argument.startswith("-"):
            continue
        option, equals, value = argument.partition("=")
        if argument.startswith("-c") and not equals and len(argument) > 2:
            option, value = "-c", argument[2:]
        elif not equals and place < len(args):
            # the value of an option that we do not read is skipped above, as it has no leading hyphen
            value = args[place]
        option, append = (option[:-1], "+") if option.endswith("+") else (option, "")
        if option == "-c" or (len(option) > 3 and "--config".startswith(option)):
            content = _load(value)
            if not inside:
                content = content.get(str(subcommand)) or {}
            sources.append(_Source(_name(value), _with_files(content, value), before_subcommand=not inside))
        elif len(option) > 12 and "--trainer.callbacks".startswith(option):
            sources.append(_Source(_COMMAND_LINE, {"trainer": {f"callbacks{append}": _value(value)}}))
        elif option in {"--trainer", *(f"--{key}" for key in _CLASSES)}:
            file = _is_file(value)
            content = {option[2:]: _load(value) if file else _value(value)}
            sources.append(_Source(_name(value) if file else _COMMAND_LINE, content))
    return sources


def _subcommand(args: Sequence[str]) -> str | None:
    for before, argument in zip(["", *args], args, strict=False):
        # `--config fit` would be a file of that name
        if argument in SUBCOMMANDS and not (before.startswith("-") and "=" not in before):
            return argument
    return None


def _with_files(content: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """The content with dotted keys nested, and files that stand for ``trainer``, ``model`` or ``data`` read."""
    nested: dict[str, Any] = {}
    for key, value in content.items():
        place = nested
        *parents, last = str(key).split(".")
        for parent in parents:
            inner = place.get(parent)
            place[parent] = place = dict(inner) if isinstance(inner, Mapping) else {}
        inner = place.get(last)
        place[last] = {**inner, **value} if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    for key in ("trainer", *_CLASSES):
        value = nested.get(key)
        if isinstance(value, str):
            beside = Path(origin).parent / value
            for candidate in (str(beside), value):
                if _is_file(candidate):
                    nested[key] = _load(candidate)
                    break
    return nested


def _load(value: str) -> dict[str, Any]:
    """A configuration file, or a configuration written out; empty where it cannot be read, which the parser reports."""
    try:
        if _is_file(value) or "://" in value:
            with fsspec.open(value, "r", encoding="utf-8") as file:
                content = yaml.safe_load(file)
        else:
            content = yaml.safe_load(value)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, ImportError):
        return {}
    return content if isinstance(content, dict) else {}


def _value(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _is_file(value: str) -> bool:
    try:
        return os.path.isfile(value)
    except ValueError:  # not a path at all
        return False


def _name(value: str) -> str:
    return value if _is_file(value) or "://" in value else _COMMAND_LINE


def _class_names(value: object) -> list[str]:
    """Class names of one class or a list of them, without their modules."""
    if isinstance(value, (list, tuple)):
        return [name for item in value for name in _class_names(item)]
    if isinstance(value, Mapping):
        value = value.get("class_path")
    return [value.rpartition(".")[2]] if isinstance(value, str) else []


def _listed(found: Iterable[tuple[_Source, str]]) -> str:
    names: dict[str, list[str]] = {}
    for source, name in found:
        names.setdefault(source.name, []).append(name)
    return " and ".join(f"{', '.join(each)} of {source}" for source, each in names.items())
