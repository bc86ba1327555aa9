"""Run records on disk -> scenarios, in each of which the runs forget the same rows."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_trust.core.records import FILE_NAME, METRICS, RunRecord, average_gap, metrics_gap
from lightning_trust.core.robustness_record import FILE_NAME as ROBUST_NAME
from lightning_trust.core.robustness_record import RobustnessRecord
from lightning_trust.nn.prompting.saved_prompt import CARD as PROMPT_NAME
from lightning_trust.nn.prompting.saved_prompt import read_prompt
from lightning_trust.nn.prompting.visual_prompt import VisualPrompt

Kind = Literal["original", "retrain", "method"]


@dataclass(frozen=True)
class Run:
    """A run record and the file that it stands in.

    Args:
        path: The ``run.json``.
        record: What it holds.

    """

    path: Path
    record: RunRecord


@dataclass(frozen=True)
class RobustRun:
    """A robustness record and the file that it stands in.

    Args:
        path: The ``robustness.json``.
        record: What it holds.

    """

    path: Path
    record: RobustnessRecord


@dataclass(frozen=True)
class PromptRun:
    """A saved prompt.

    Args:
        path: The ``prompt.json``.
        part: Prompt and mapping.
        card: What the file says.

    """

    path: Path
    part: VisualPrompt
    card: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of a scenario's table.

    Args:
        label: What the line is called.
        kind: ``"original"`` (the model that unlearning starts from), ``"retrain"`` or ``"method"``.
        metrics: UA, RA, TA and MIA in percent.
        differences: The same minus those of the reference, in points; ``None`` where there is no Retrain.
        gap: Mean of the absolute differences in points; ``None`` where there is no Retrain.
        seconds: Optimizer steps and the passes that prepare them; ``None`` for the original.
        share: ``seconds`` as a share of the reference's; ``None`` where one of them is missing.
        sparsity: Share of zero weights; ``None`` for a dense run.
        reference: Whether the gaps are measured from this line.
        record: The run behind the line; ``None`` for the original.

    """

    label: str
    kind: Kind
    metrics: Mapping[str, float]
    differences: Mapping[str, float] | None
    gap: float | None
    seconds: float | None = None
    share: float | None = None
    sparsity: float | None = None
    reference: bool = False
    record: RunRecord | None = None


@dataclass(frozen=True)
class Scenario:
    """The runs of one forget set.

    Args:
        name: What was to be forgotten, in words.
        runs: The runs in order of their paths; all have the same ``forget["hash"]``.

    """

    name: str
    runs: Sequence[Run]

    @property
    def records(self) -> list[RunRecord]:
        """The records of the runs, in order of their paths."""
        return [run.record for run in self.runs]

    @property
    def forget(self) -> Mapping[str, Any]:
        """Hash, specification and row counts of the forget set."""
        return self.runs[0].record.forget

    @property
    def reference(self) -> RunRecord | None:
        """The Retrain that gaps are measured from: the first by path, or ``None``."""
        return next((record for record in self.records if record.role == "retrain"), None)

    @property
    def spread(self) -> float | None:
        """Mean gap of the other Retrains to the first, in points: the yardstick. ``None`` with fewer than two."""
        gaps = [row.gap for row in self.rows() if row.kind == "retrain" and not row.reference and row.gap is not None]
        return math.fsum(gaps) / len(gaps) if gaps else None

    def rows(self) -> list[Row]:
        """The lines of the table: the original, the Retrains, then the methods in order of their gap."""
        reference = self.reference
        records = self.records
        rows = [self._row(record, reference) for record in records if record.role == "retrain"]
        methods = [self._row(record, reference) for record in records if record.role == "method"]
        methods.sort(key=lambda row: (math.inf if row.gap is None else row.gap, row.label))
        return [*self._originals(reference), *rows, *methods]

    def best(self) -> Row | None:
        """The method that is closest to Retrain, or ``None``."""
        rows = [row for row in self.rows() if row.kind == "method" and row.gap is not None]
        return rows[0] if rows else None

    def _originals(self, reference: RunRecord | None) -> list[Row]:
        starts: list[tuple[Mapping[str, float], list[str]]] = []
        for record in self.records:
            if record.before is None:
                continue
            for metrics, labels in starts:
                if all(math.isclose(metrics[name], record.before[name], abs_tol=1e-6) for name in METRICS):
                    labels.append(record.label)
                    break
            else:
                starts.append((record.before, [record.label]))
        rows = []
        for metrics, labels in starts:
            # several trained models: say whose start each one was
            label = "Original" if len(starts) == 1 else f"Original of {', '.join(dict.fromkeys(labels))}"
            differences, gap = _distance(metrics, reference)
            rows.append(Row(label, "original", metrics, differences, gap))
        return rows

    def _row(self, record: RunRecord, reference: RunRecord | None) -> Row:
        differences, gap = _distance(record.metrics, reference)
        work = None if reference is None else reference.work
        return Row(
            label=self._label(record),
            kind=record.role,
            metrics=record.metrics,
            differences=differences,
            gap=gap if reference is None else average_gap(record, reference),
            seconds=record.work,
            share=record.work / work if work else None,
            sparsity=record.sparsity,
            reference=record is reference,
            record=record,
        )

    def _label(self, record: RunRecord) -> str:
        if sum(other.label == record.label for other in self.records) == 1:
            return record.label
        same = [run for run in self.runs if run.record.label == record.label]
        if record.seed is not None and sum(run.record.seed == record.seed for run in same) == 1:
            return f"{record.label}, seed {record.seed}"
        # neither label nor seed tells them apart: the folder does
        return f"{record.label}, {next(run.path.parent.name for run in same if run.record is record)}"


def _distance(
    metrics: Mapping[str, float], reference: RunRecord | None
) -> tuple[Mapping[str, float] | None, float | None]:
    if reference is None:
        return None, None
    differences = {name: metrics[name] - reference.metrics[name] for name in METRICS}
    return differences, metrics_gap(metrics, reference.metrics)


@dataclass(frozen=True)
class Collection:
    """What :func:`collect` found.

    Args:
        scenarios: One a forget set, in order of their names.
        damaged: Files that could not be read, each with the reason.
        robust: The robustness records, in order of their paths.

    """

    scenarios: Sequence[Scenario]
    damaged: Mapping[Path, str] = field(default_factory=dict)
    robust: Sequence[RobustRun] = ()
    prompts: Sequence[PromptRun] = ()


def find(paths: Iterable[str | Path], name: str = FILE_NAME) -> list[Path]:
    """The ``run.json`` files, or those of another name, in folders (at any depth), files and globs, sorted.

    Raises:
        FileNotFoundError: If a path or pattern matches nothing.

    """
    found: set[Path] = set()
    for path in paths:
        places = [Path(place) for place in glob.glob(str(path), recursive=True)] or [Path(path)]
        for place in places:
            if place.is_dir():
                found.update(place.rglob(name))
            elif place.is_file():
                # a glob such as runs/*/* also matches checkpoints; one file of any name is taken at its word
                other = place.name in (FILE_NAME, ROBUST_NAME, PROMPT_NAME) and place.name != name
                if place.name == name or (len(places) == 1 and name == FILE_NAME and not other):
                    found.add(place)
            else:
                raise FileNotFoundError(
                    f"Expected argument `paths` to name run folders, {FILE_NAME} files or globs,"
                    f" but there is no {path}."
                )
    return sorted(found)


def collect(paths: Iterable[str | Path]) -> Collection:
    """Read every record in folders, files and globs, and group those of unlearning by forget set.

    A damaged record costs its own line, not the report: it is listed with the reason.

    Args:
        paths: Folders (searched at any depth), ``run.json`` and ``robustness.json`` files, or globs.

    Returns:
        The scenarios, the robustness records and the damaged files.

    Raises:
        FileNotFoundError: If a path does not exist, or no record is found at all.
        ValueError: If every record that was found is damaged.

    """
    paths = list(paths)
    files, robust_files, prompt_files = find(paths), find(paths, ROBUST_NAME), find(paths, PROMPT_NAME)
    if not files and not robust_files and not prompt_files:
        raise FileNotFoundError(
            f"Expected argument `paths` to hold at least one {FILE_NAME}, but found none in"
            f" {', '.join(str(path) for path in paths)}. `UnlearningReport` writes one a run, and"
            f" `RobustEvaluation` a {ROBUST_NAME}, `SavePrompt` a {PROMPT_NAME}."
        )
    groups: dict[str, list[Run]] = {}
    damaged: dict[Path, str] = {}
    for path in files:
        try:
            record = RunRecord.read(path)
        except (ValueError, OSError) as error:  # noqa: PERF203 - one damaged record must not cost the others
            damaged[path] = str(error)
        else:
            groups.setdefault(record.forget["hash"], []).append(Run(path, record))
    robust = []
    for path in robust_files:
        try:
            robust.append(RobustRun(path, RobustnessRecord.read(path)))
        except (ValueError, OSError) as error:  # noqa: PERF203 - as above
            damaged[path] = str(error)
    prompts = []
    for path in prompt_files:
        try:
            prompts.append(PromptRun(path, *read_prompt(path.parent)))
        except (ValueError, OSError, KeyError, RuntimeError, TypeError) as error:  # noqa: PERF203 - as above
            damaged[path] = str(error)
    if not groups and not robust and not prompts:
        raise ValueError("No run record could be read:\n" + "\n".join(damaged.values()))
    scenarios = [Scenario(runs[0].record.scenario, runs) for runs in groups.values()]
    names = [scenario.name for scenario in scenarios]
    # the same words for different rows, such as a random 10 % under another seed
    scenarios = [
        Scenario(f"{each.name} ({each.forget['hash'][:8]})", each.runs) if names.count(each.name) > 1 else each
        for each in scenarios
    ]
    scenarios.sort(key=lambda scenario: scenario.name)
    return Collection(scenarios, damaged, robust, prompts)
