"""What the small experiment of a method measured: written by benchmarks, read by the tables of README and docs.

    python -m benchmarks.results runs/demo --method demo --experiment "..." --config configs/unlearning/demo.yaml \
        --output benchmarks/results/unlearning/demo.json

makes a result of one seed from the run records in a folder. The format is written down in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored import StoredResult, now
from lightning_trust.catalog import METHODS, MethodEntry
from lightning_trust.core.records import METRICS, RunRecord, average_gap, metrics_gap
from lightning_trust.report import collect


@dataclass(frozen=True)
class ResultRow:
    """One run; ``None`` where something was not measured."""

    run: str
    seed: int
    scenario: str
    UA: float | None = None
    RA: float | None = None
    TA: float | None = None
    MIA: float | None = None
    gap: float | None = None
    steps_seconds: float | None = None
    passes_seconds: float | None = None
    share_of_retrain: float | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class Result(StoredResult):
    """One experiment of forgetting: its runs over all seeds, and on what they ran."""

    kind = "lightning_trust.result"
    row = ResultRow

    def summary(self) -> list[dict[str, Any]]:
        """A line a scenario and run: means over the seeds, in the order in which the runs came first."""
        lines = []
        for scenario, run in dict.fromkeys((row.scenario, row.run) for row in self.rows):
            rows = [row for row in self.rows if (row.scenario, row.run) == (scenario, run)]
            by_seed = {row.seed: row for row in rows}
            if len(by_seed) != len(rows):
                raise ValueError(f"Expected one row of '{run}' a seed for '{scenario}', but got {len(rows)}.")
            gaps = [by_seed[seed].gap if seed in by_seed else None for seed in self.seeds]
            lines.append(
                {
                    "scenario": scenario,
                    "run": run,
                    **{name: _mean([getattr(row, name) for row in rows]) for name in METRICS},
                    "gap_mean": _mean(gaps),
                    "gap_per_seed": gaps,
                    "seconds_mean": _mean([_seconds(row) for row in rows]),
                    "share_of_retrain_mean": _mean([row.share_of_retrain for row in rows]),
                    "sparsity": _mean([row.sparsity for row in rows]),
                }
            )
        return lines

    def content(self) -> dict[str, Any]:
        """What a file holds, the summary included."""
        return {**super().content(), "summary": self.summary()}

    def check(self, path: str | Path, data: Mapping[str, Any]) -> None:
        """Refuse a file whose summary is not that of its rows."""
        if "summary" not in data:
            raise ValueError(f"Expected {path} to hold a result, but it lacks ['summary'].")
        if self.summary() != data["summary"]:
            raise ValueError(f"Expected the summary of {path} to be that of its rows, but it is not.")


def write_results(
    folder: str | Path,
    records: Mapping[int, Mapping[str, Mapping[str, RunRecord]]],
    labels: Mapping[str, str],
    experiment: str | None = None,
) -> list[Path]:
    """Write one result a method of the catalog that is among the runs.

    A method's result has the runs named after its class, what they are compared with (the model before, Retrain,
    another Retrain), and for pruning the same methods without it.

    Args:
        folder: Where ``<family>/<method>.json`` shall stand.
        records: Seed -> scenario -> run -> record; the run ``"retrain"`` of a scenario is what gaps are measured from.
        labels: Run -> its name in tables.
        experiment: What was done, in words.

    """
    rows = [
        row
        for seed, scenarios in records.items()
        for runs in scenarios.values()
        for row in _seed_rows(runs, labels, seed)
    ]
    one = next(iter(next(iter(next(iter(records.values())).values())).values()))
    words = (
        f"Fashion-MNIST, {one.forget['forget'] + one.forget['retain']:,} training rows, a small CNN with"
        f" {one.parameters:,} parameters: trained, then made to forget"
    )
    written = []
    for entry in METHODS:
        name = entry.classes[0].rpartition(".")[2]
        if any(name in row.run for row in rows):
            result = Result(
                method=entry.name,
                experiment=experiment or words,
                config=entry.config,
                hardware=dict(one.hardware),
                versions=dict(one.versions),
                created=now(),
                seeds=list(records),
                rows=[row for row in rows if _belongs(row, entry)],
            )
            path = Path(folder) / Path(entry.results).relative_to("benchmarks/results")
            written.append(result.write(path))
    return written


def _belongs(row: ResultRow, entry: MethodEntry) -> bool:
    name = entry.classes[0].rpartition(".")[2]
    if name in row.run or row.run == "Original" or row.run.startswith("Retrain"):
        return True
    return entry.family == "pruning" and row.run in {"FineTune", "SalUn"}


def _seed_rows(runs: Mapping[str, RunRecord], labels: Mapping[str, str], seed: int) -> list[ResultRow]:
    reference = runs["retrain"]
    rows = []
    for record in runs.values():
        if record.before is not None:
            gap = metrics_gap(record.before, reference.metrics)
            rows.append(ResultRow("Original", seed, record.scenario, **record.before, gap=gap))
            break
    for run, record in runs.items():
        rows.append(
            ResultRow(
                run=labels[run],
                seed=seed,
                scenario=record.scenario,
                **record.metrics,
                gap=average_gap(record, reference),
                steps_seconds=record.seconds["steps"],
                passes_seconds=record.seconds["passes"],
                share_of_retrain=record.work / reference.work if reference.work else None,
                sparsity=record.sparsity,
            )
        )
    return rows


def result_of_runs(folder: str | Path, method: str, experiment: str, config: str) -> Result:
    """A result of one seed from the run records in a folder, such as that of ``make demo``.

    The first Retrain of a forget set by path is the reference, and gives the seed.
    """
    rows = []
    scenarios = collect([folder]).scenarios
    reference = next((each.reference for each in scenarios if each.reference is not None), None)
    if reference is None:
        raise ValueError(f"Expected argument `folder` to hold a Retrain, but there is none in {folder}.")
    seed = reference.seed or 0
    for scenario in scenarios:
        if scenario.reference is None:
            raise ValueError(f"Expected argument `folder` to hold a Retrain for '{scenario.name}', but it does not.")
        # the lines of a report: the original, the Retrains (the reference first), the methods by their gap
        records = [row.record for row in scenario.rows() if row.record is not None]
        runs = {"retrain": records[0], **{str(place): record for place, record in enumerate(records[1:])}}
        labels = {
            run: "Retrain (another seed)" if record.role == "retrain" else record.label for run, record in runs.items()
        }
        rows += _seed_rows(runs, {**labels, "retrain": "Retrain"}, seed)
    return Result(
        method=method,
        experiment=experiment,
        config=config,
        hardware=dict(reference.hardware),
        versions=dict(reference.versions),
        created=now(),
        seeds=[seed],
        rows=rows,
    )


def _seconds(row: ResultRow) -> float | None:
    return None if row.steps_seconds is None else row.steps_seconds + (row.passes_seconds or 0.0)


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of values of which none is missing: a mean over some of the seeds would be another figure."""
    known = [value for value in values if value is not None]
    return round(math.fsum(known) / len(known), 6) if known and len(known) == len(values) else None


def main(args: Sequence[str] | None = None) -> None:
    """Make a result of one seed from the run records in a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=main.__doc__)
    parser.add_argument("folder")
    for name in ("method", "experiment", "config", "output"):
        parser.add_argument(f"--{name}", required=True)
    parsed = parser.parse_args(args)
    result_of_runs(parsed.folder, parsed.method, parsed.experiment, parsed.config).write(parsed.output)


if __name__ == "__main__":
    main()
