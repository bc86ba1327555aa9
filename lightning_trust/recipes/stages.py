"""A recipe: stages of the command line, each recorded by a hash of its configuration and skipped once finished."""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.text import Text

from lightning_trust.core.files import read_json, write_json

KIND = "lightning_trust.stage"
VERSION = 1
FILE_NAME = "stage.json"
Command = Literal["fit", "validate", "test", "report"]


@dataclass(frozen=True)
class Stage:
    """One run of the command line.

    Args:
        name: Its name, which is also the name of its folder; letters, digits, ``_``, ``-`` and ``.``.
        command: ``"fit"``, ``"validate"``, ``"test"`` or ``"report"``.
        args: For a report ``paths`` and ``output`` (and ``markdown``); else ``config``, a file or a list of files, and
            dotted overrides such as ``trainer.max_epochs`` or ``trainer.callbacks+``.
        needs: Names of earlier stages: if one of them ran again, so does this one. A report that names none needs all
            stages before it.

    Raises:
        ValueError: If a value breaks its rule.

    """

    name: str
    command: Command
    args: Mapping[str, Any] = field(default_factory=dict)
    needs: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise ValueError(
                f"Expected `name` of a stage to be made of letters, digits, '_', '-' and '.', but got {self.name!r}."
            )
        if self.command not in get_args(Command):
            raise ValueError(
                f"Expected `command` of stage '{self.name}' to be one of {list(get_args(Command))},"
                f" but got {self.command!r}."
            )
        if not isinstance(self.args, Mapping):
            raise ValueError(f"Expected `args` of stage '{self.name}' to be a mapping, but got {self.args!r}.")
        if not isinstance(self.needs, (list, tuple)) or not all(isinstance(need, str) for need in self.needs):
            raise ValueError(f"Expected `needs` of stage '{self.name}' to be a list of names, but got {self.needs!r}.")
        if self.command == "report":
            _known(self.args, ("paths", "output", "markdown"), f"`args` of stage '{self.name}'")
            if not self.args.get("paths") or not self.args.get("output"):
                raise ValueError(
                    f"Expected `args` of stage '{self.name}' to have `paths` and `output`, but got {sorted(self.args)}."
                )

    @property
    def configs(self) -> list[str]:
        """The configuration files in their order."""
        if self.command == "report":
            return []
        return _strings(self.args.get("config", []))

    def command_line(self) -> list[str]:
        """The arguments for the command line, without the program's name.

        Example:
            >>> Stage("a", "fit", {"config": ["a.yaml"], "trainer.max_epochs": 3, "ckpt_path": None}).command_line()
            ['fit', '--config=a.yaml', '--trainer.max_epochs=3', '--ckpt_path=null']

        """
        if self.command == "report":
            options = [f"--{name}={self.args[name]}" for name in ("output", "markdown") if name in self.args]
            return ["report", *_strings(self.args["paths"]), *options]
        line: list[str] = [self.command, *(f"--config={file}" for file in self.configs)]
        for key, value in self.args.items():
            if key != "config":
                line.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        return line

    def fingerprint(self) -> str:
        """A hash of the arguments and of the contents of every configuration file that they name.

        Raises:
            FileNotFoundError: If a file of ``config`` does not exist.

        """
        for file in self.configs:
            if not Path(file).is_file():
                raise FileNotFoundError(
                    f"Expected `config` of stage '{self.name}' to name files, but there is no {file}"
                    f" (looked in {Path.cwd()})."
                )
        # an override may name a file as well: `trainer: trainer.yaml`
        files = [*self.configs, *(value for value in self.args.values() if _is_config(value))]
        contents = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
        text = json.dumps([self.command, self.args, contents], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """Stages that run one after the other through the command line, in this process.

    ``<folder>/<name>/stage.json`` records a finished stage: a hash of its arguments and of the contents of its
    configuration files, and which runs of the stages it needs it was made from. A recorded stage is skipped until one
    of these changes. A stage that fails leaves no record, so the next call goes on there.

    Args:
        stages: The stages in their order.
        folder: Where the records stand.

    Raises:
        ValueError: If there is no stage, two have one name, or one needs a stage that does not come before it.

    """

    stages: Sequence[Stage]
    folder: Path = Path("runs")

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("Expected `stages` to be a list of at least one stage, but got none.")
        names: list[str] = []
        for stage in self.stages:
            if stage.name in names:
                raise ValueError(f"Expected every stage to have a name of its own, but got '{stage.name}' twice.")
            for need in stage.needs:
                if need not in names:
                    raise ValueError(
                        f"Expected `needs` of stage '{stage.name}' to name stages before it"
                        f" ({', '.join(names) or 'there are none'}), but got '{need}'."
                    )
            names.append(stage.name)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe.

        The file has ``stages``, a list of mappings with the arguments of :class:`Stage`, and optionally ``folder`` and
        ``variables``. ``${name}`` stands for a variable, ``${folder}`` for the folder, ``${stage}`` for
        ``<folder>/<name>`` of the stage that it is written in; ``$${`` is a plain ``${``. A value that is nothing but
        one variable keeps its type. Paths are relative to the working directory.

        Args:
            path: The YAML file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no YAML, has unknown keys or variables, or a value breaks its rule.

        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"Expected argument `recipe` to be a YAML file, but there is no {path}.")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"Expected {path} to be a YAML file, but it is damaged: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"Expected {path} to be a mapping with `stages`, but got {type(data).__name__}.")
        try:
            return cls._of(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> Recipe:
        _known(data, ("folder", "variables", "stages"), "the recipe")
        variables = data.get("variables") or {}
        if not isinstance(variables, Mapping):
            raise ValueError(f"Expected `variables` to be a mapping, but got {variables!r}.")
        reserved = sorted({"folder", "stage"} & set(variables))
        if reserved:
            raise ValueError(f"Expected `variables` to leave `folder` and `stage` to the recipe, but got {reserved}.")
        folder = _filled(data.get("folder", "runs"), variables)
        if not isinstance(folder, str) or not folder:
            raise ValueError(f"Expected `folder` to be a path, but got {folder!r}.")
        stages = data.get("stages")
        if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
            raise ValueError(f"Expected `stages` to be a list of mappings, but got {stages!r}.")
        made: list[Stage] = []
        for stage in stages:
            _known(stage, ("name", "command", "args", "needs"), f"stage {stage.get('name', len(made) + 1)!r}")
            missing = [key for key in ("name", "command") if key not in stage]
            if missing:
                raise ValueError(f"Expected stage {stage.get('name', len(made) + 1)!r} to have {missing}.")
            here = {**variables, "folder": folder, "stage": f"{folder}/{stage['name']}"}
            made.append(Stage(**_filled(stage, here)))
        return cls(made, Path(folder))

    def run(self, main: Callable[[list[str]], object], console: Console | None = None) -> list[str]:
        """Run the stages that are not finished, and every report.

        Args:
            main: The command line, called in this process with the arguments of a stage.
            console: Where headings are printed; by default the terminal.

        Returns:
            The names of the stages that ran.

        Raises:
            RuntimeError: In one of several processes of a launcher.
            Exception: What a stage raises; the stages before it stay recorded.

        """
        if "LOCAL_RANK" in os.environ:
            raise RuntimeError(
                "A recipe is run by one process, but this is one of several, which would each run every stage."
                " For stages on several devices use `trainer.strategy: ddp_fork` (or ddp_spawn), not ddp or torchrun."
            )
        console = console or Console()
        finished: dict[str, str] = {}
        ran: list[str] = []
        start = time.perf_counter()
        for place, stage in enumerate(self.stages, start=1):
            record_file = self.folder / stage.name / FILE_NAME
            needs = stage.needs
            if stage.command == "report" and not needs:
                needs = [each.name for each in self.stages[: place - 1]]
            wanted = {"hash": stage.fingerprint(), "needs": {need: finished[need] for need in needs}}
            record = _recorded(record_file)
            heading = f"[{place}/{len(self.stages)}] {stage.name}"
            # a report takes a second, and who runs a recipe again wants to see it
            if record is not None and stage.command != "report" and {key: record.get(key) for key in wanted} == wanted:
                finished[stage.name] = str(record["run"])
                when = str(record["created"])[:16].replace("T", " ")
                console.print(Text(f"{heading}: finished {when} UTC, unchanged, skipped", style="dim"))
                continue
            console.rule(Text(f"{heading} ({stage.command})", style="bold"), align="left")
            # should this run fail, the record of an older one must not speak for it
            record_file.unlink(missing_ok=True)
            begin = time.perf_counter()
            try:
                main(stage.command_line())
            except BaseException:
                words = f"{heading} failed. The stages before it are kept: run the recipe again to go on from here."
                console.print(Text(words, style="bold red"))
                raise
            seconds = time.perf_counter() - begin
            finished[stage.name] = uuid.uuid4().hex
            write_json(
                record_file,
                KIND,
                VERSION,
                {
                    **wanted,
                    "run": finished[stage.name],
                    "command": stage.command_line(),
                    "seconds": seconds,
                    "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                },
            )
            ran.append(stage.name)
            console.print(Text(f"{heading}: {seconds:.1f} s", style="bold green"))
        skipped = len(self.stages) - len(ran)
        words = f"{len(ran)} of {len(self.stages)} stages ran in {time.perf_counter() - start:.1f} s"
        if skipped:
            words += f", {skipped} skipped (to run a stage again, remove its folder in {self.folder})"
        console.print(Text(words + "."))
        return ran


def _recorded(path: Path) -> dict[str, Any] | None:
    try:
        record = read_json(path, KIND, VERSION)
    except (ValueError, OSError):  # a record that cannot be read vouches for nothing
        return None
    return record if {"hash", "needs", "run", "created"} <= record.keys() else None


def _known(data: Mapping[str, Any], keys: Iterable[str], what: str) -> None:
    keys = list(keys)
    unknown = [str(key) for key in data if key not in keys]
    if unknown:
        close = difflib.get_close_matches(unknown[0], keys, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"Expected {what} to have only the keys {keys}, but got {unknown}.{hint}")


def _strings(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


def _is_config(value: object) -> bool:
    return isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")) and os.path.isfile(value)


def _filled(value: Any, variables: Mapping[str, Any]) -> Any:
    """The value with its ``${name}`` replaced, at any depth."""
    if isinstance(value, Mapping):
        return {key: _filled(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def one(match: re.Match[str]) -> Any:
        name = match.group(1)
        if name not in variables:
            close = difflib.get_close_matches(name, [str(key) for key in variables], n=1)
            hint = (
                f" Did you mean '{close[0]}'?" if close else f" There are: {', '.join(map(str, variables)) or 'none'}."
            )
            raise ValueError(f"Expected `${{{name}}}` to be one of the variables, but there is no such one.{hint}")
        return variables[name]

    whole = re.fullmatch(r"\$\{(\w+)\}", value)
    if whole:
        return one(whole)
    return re.sub(r"(?<!\$)\$\{(\w+)\}", lambda match: str(one(match)), value).replace("$${", "${")
