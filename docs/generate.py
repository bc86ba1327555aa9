"""Fill the generated parts of README.md and docs/: tables from the catalog, docstrings, results and configurations.

    python -m docs.generate

A generated part stands between ``<!-- generated: WHAT -->`` and ``<!-- end -->``, where WHAT is one of: ``methods``;
``demo``; ``results``; ``robustness``; ``result METHOD``; ``curves METHOD``; ``overhead``; ``attacks``;
``zeroth-order``; ``prompting``; ``arguments CLASS``; ``papers METHOD``; ``file PATH``.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_trust.attacks
import lightning_trust.callbacks
import lightning_trust.datamodules
import lightning_trust.metrics
import lightning_trust.modules
import lightning_trust.nn
import lightning_trust.optim
import lightning_trust.recipes
from benchmarks.curve_results import CurveResult, drawing
from benchmarks.results import Result
from benchmarks.robustness_results import RobustnessResult, RobustnessRow
from benchmarks.table_results import Column, TableResult
from lightning_trust.catalog import METHODS, MethodEntry, method
from lightning_trust.core.files import read_json
from lightning_trust.core.records import METRICS, metrics_gap
from lightning_trust.report.table import percent, seconds

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: whose classes have tables of arguments
ROOMS = (
    lightning_trust.attacks,
    lightning_trust.callbacks,
    lightning_trust.datamodules,
    lightning_trust.metrics,
    lightning_trust.modules,
    lightning_trust.nn,
    lightning_trust.optim,
    lightning_trust.recipes,
)
NOT_YET = "Not measured yet."
NOTE = (
    "UA, RA, TA and MIA in percent: unlearning accuracy (share of the forgotten rows that the model gets wrong),"
    " accuracy on the rows that are kept, test accuracy, and the share of the forgotten rows that a membership attack"
    " takes for rows never seen. Closer to Retrain is better: a larger UA or MIA is not. Gap: mean of the four absolute"
    " differences to Retrain, in points. Time: optimizer steps and the passes that prepare them."
)
_BLOCK = re.compile(r"(<!-- generated: ([^\n]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """README, every page of docs/, and the page of the benchmarks."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, page: Path) -> str:
    """The text of a page with its generated parts made anew.

    Args:
        text: The text.
        page: Where it stands, for relative links.

    Raises:
        ValueError: If a part has an unknown name.

    """

    def one(match: re.Match[str]) -> str:
        return f"{match[1]}{_part(match[2], page).strip()}\n{match[4]}"

    return _BLOCK.sub(one, text)


def _part(what: str, page: Path) -> str:
    name, _, argument = what.partition(" ")
    parts: dict[str, Callable[[], str]] = {
        "methods": lambda: _methods(page),
        "demo": lambda: _result(RESULTS / "unlearning" / "demo.json"),
        "results": lambda: _results(page),
        "robustness": lambda: _robustness(ROOT / method("adversarial-training").results),
        "result": lambda: _result_of(method(argument)),
        "table": lambda: _figures(ROOT / argument),
        "curves": lambda: _curves(method(argument), page),
        "overhead": lambda: _overhead(RESULTS / "overhead.json"),
        "attacks": lambda: _attacks(RESULTS / "attacks.json"),
        "zeroth-order": lambda: _costs(RESULTS / "zeroth_order.json", "lightning_trust.zeroth_order"),
        "prompting": lambda: _costs(RESULTS / "prompting.json", "lightning_trust.prompting"),
        "arguments": lambda: _arguments(argument),
        "papers": lambda: "\n".join(f"- *{paper.title}.* {paper.venue}." for paper in method(argument).papers),
        "file": lambda: f"```yaml\n{(ROOT / argument).read_text(encoding='utf-8').rstrip()}\n```",
    }
    if name not in parts:
        raise ValueError(f"Expected a generated part to be one of {list(parts)}, but got {what!r} in {page}.")
    return parts[name]()


def _table(head: list[str], rows: list[list[str]], numbers: int = 0) -> str:
    """A Markdown table; the last ``numbers`` columns are aligned to the right."""
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [head, rule, *rows]]
    return "\n".join(lines)


def _link(words: str, target: str, page: Path) -> str:
    return f"[{words}]({os.path.relpath(ROOT / target, page.parent)})"


def _methods(page: Path) -> str:
    rows = [
        [
            _link(entry.name, entry.docs, page),
            entry.family,
            entry.title,
            ", ".join(f"`{path.rpartition('.')[2]}`" for path in entry.classes),
            "; ".join(paper.venue for paper in entry.papers),
        ]
        for entry in METHODS
    ]
    return _table(["Method", "Family", "What it does", "Classes", "Papers"], rows)


def _forgets(entry: MethodEntry) -> bool:
    """Whether the small experiment of a method compares with Retrain."""
    return entry.family in ("pruning", "unlearning")


def _result_of(entry: MethodEntry) -> str:
    path = ROOT / entry.results
    if _forgets(entry):
        return _result(path)
    if path.is_file() and (kind := json.loads(path.read_text(encoding="utf-8"))["kind"]) != RobustnessResult.kind:
        return {TableResult.kind: _figures, CurveResult.kind: _budgets}[kind](path)
    return _robustness(path)


# -- what was measured -------------------------------------------------------------------------------------------------
def _result(path: Path) -> str:
    if not path.is_file():
        return NOT_YET
    result = Result.read(path)
    summary = result.summary()
    text = []
    for scenario in dict.fromkeys(line["scenario"] for line in summary):
        lines = [line for line in summary if line["scenario"] == scenario]
        sparse = any(line["sparsity"] is not None for line in lines)
        head = ["Run", *METRICS, "Gap", "Time", "Share of Retrain's", *(["Zeros"] if sparse else [])]
        rows = [
            [
                line["run"],
                *(_number(line[name], 1) for name in METRICS),
                "reference" if line["run"] == "Retrain" else _gap(line),
                "" if line["seconds_mean"] is None else seconds(line["seconds_mean"]),
                "" if line["share_of_retrain_mean"] is None else percent(line["share_of_retrain_mean"]),
                *(["" if line["sparsity"] is None else percent(line["sparsity"])] if sparse else []),
            ]
            for line in lines
        ]
        text += [f"**Forget {scenario}**", "", _table(head, rows, len(head) - 1), ""]
    return "\n".join([*text, f"{_where(result)} {NOTE}"])


def _results(page: Path) -> str:
    rows = []
    entries = [entry for entry in METHODS if _forgets(entry)]
    for entry in entries:
        words = _link(entry.name, entry.docs, page)
        path = ROOT / entry.results
        if not path.is_file():
            rows.append([words, "", "", NOT_YET.lower().rstrip("."), "", ""])
            continue
        summary = Result.read(path).summary()
        name = entry.classes[0].rpartition(".")[2]
        for scenario in dict.fromkeys(line["scenario"] for line in summary):
            lines = [line for line in summary if line["scenario"] == scenario]
            own = next((line for line in lines if line["run"] == name), None) or next(
                line for line in lines if name in line["run"]
            )
            spread = next((line for line in lines if line["run"].startswith("Retrain (")), None)
            rows.append(
                [
                    words,
                    own["run"],
                    scenario,
                    _gap(own),
                    "not measured" if spread is None else _number(spread["gap_mean"], 2),
                    "" if own["share_of_retrain_mean"] is None else percent(own["share_of_retrain_mean"]),
                ]
            )
            words = ""
    head = [
        "Method",
        "Run",
        "Forget",
        "Gap to Retrain, points (each seed)",
        "Another Retrain",
        "Share of Retrain's time",
    ]
    results = [Result.read(ROOT / entry.results) for entry in entries if (ROOT / entry.results).is_file()]
    where = "\n".join(dict.fromkeys(_where(result) for result in results))
    return f"{_table(head, rows, 3)}\n\n{where}"


def _robustness(path: Path) -> str:
    if not path.is_file():
        return NOT_YET
    result = RobustnessResult.read(path)
    attacks = [name for name in result.rows[0].accuracy if name not in ("clean", "union")]
    one = len(result.seeds) == 1
    spread = "95 % interval of union" if one else "Each seed"
    head = ["Training", "Clean", *attacks, "Union", spread, "Seconds an epoch"]
    rows = []
    for run in dict.fromkeys(row.run for row in result.rows):
        own = [row for row in result.rows if row.run == run]
        timed = [row.epoch_seconds for row in own if row.epoch_seconds is not None]
        rows.append(
            [
                run,
                *(_share(own, name) for name in ["clean", *attacks, "union"]),
                _interval(own),
                seconds(timed[0]) if timed else "not measured",
            ]
        )
    samples = sorted({row.samples for row in result.rows})
    counts = ", ".join(map(str, samples))
    widest = max((high - low) / 2 for row in result.rows for low, high in row.intervals.values())
    words = f"Intervals: Wilson, of one network's samples (n = {counts})."
    if not one:
        words = f"95 % interval of one network (Wilson, n = {counts}): {100 * widest:.1f} points to each side at most."
    words = f"Accuracies in percent; union: correct under every attack. {words}"
    return f"{_table(head, rows, len(head) - 1)}\n\n{_where(result)} {words}"


def _figures(path: Path) -> str:
    if not path.is_file():
        return NOT_YET
    result = TableResult.read(path)
    text = []
    scenarios = list(dict.fromkeys(row.scenario for row in result.rows))
    # a figure that some runs have does not exist for those that have it in no seed
    known = {name for row in result.rows for name, value in row.values.items() if value is not None}
    for scenario in scenarios:
        head = ["Run", *(column.head for column in result.columns.values())]
        rows = []
        for run in dict.fromkeys(row.run for row in result.rows if row.scenario == scenario):
            own = [row for row in result.rows if (row.scenario, row.run) == (scenario, run)]
            cells = [
                _figure([row.values[name] for row in own], column, place == 0)
                if any(row.values[name] is not None for row in own) or name not in known
                else ""
                for place, (name, column) in enumerate(result.columns.items())
            ]
            rows.append([run, *cells])
        title = [f"**{scenario[:1].upper()}{scenario[1:]}**", ""] if len(scenarios) > 1 else []
        text += [*title, _table(head, rows, len(head) - 1), ""]
    return "\n".join([*text, _where(result)])


def _figure(values: list[float | None], column: Column, each: bool) -> str:
    """Mean over the seeds, and those of the first column one by one."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not measured"
    mean = sum(known) / len(known)
    if column.unit == "seconds":
        return seconds(mean)
    if column.unit == "number" and all(value == int(value) for value in known):
        # a count
        return f"{mean:,.0f}"
    scale = 100 if column.unit in ("percent", "points") else 1
    places = 1 if scale == 100 else 2
    text = _number(scale * mean, places)
    return f"{text} ({', '.join(_number(scale * one, places) for one in known)})" if each and len(known) > 1 else text


def _share(rows: list[RobustnessRow], name: str) -> str:
    return f"{100 * sum(row.accuracy[name] for row in rows) / len(rows):.1f}"


def _interval(rows: list[RobustnessRow]) -> str:
    if len(rows) > 1:
        return ", ".join(f"{100 * row.accuracy['union']:.1f}" for row in rows)
    low, high = rows[0].intervals["union"]
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _overhead(path: Path) -> str:
    if not path.is_file():
        return NOT_YET
    found = read_json(path, "lightning_trust.overhead", 1)
    return _bars(found, [*map(_bar, found["rows"]), *_unlearning_bars()])


def _attacks(path: Path) -> str:
    if not path.is_file():
        return NOT_YET
    found = read_json(path, "lightning_trust.attacks", 1)
    rows = found["experiment"]["rows"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = {row["network"]: row for row in rows if row["attack"] == attack}
        queries = [own[network]["queries"] for network in networks]
        lines.append(
            [
                attack,
                *(f"{own[network]['accuracy']:.1f}" for network in networks),
                *("" if count is None else f"{count:.0f}" for count in queries),
            ]
        )
    head = ["Attack", *(f"Trained {name}ly" for name in networks), *(f"Queries, {name}ly" for name in networks)]
    made = found["experiment"]
    words = (
        f"Accuracy in percent of a small CNN on {made['samples']} test images of Fashion-MNIST, linf eps 0.1; mean"
        f" queries an image of attacks on scores; seed {made['seed']}, {made['train_rows']:,} training rows,"
        f" {made['epochs']} epochs."
    )
    return f"{_bars(found, list(map(_bar, found['rows'])))}\n\n{_table(head, lines, len(head) - 1)}\n\n{words}"


def _costs(path: Path, kind: str) -> str:
    """What the parts of a family's methods cost beside what they are made of."""
    if not path.is_file():
        return NOT_YET
    found = read_json(path, kind, 1)
    return _bars(found, list(map(_bar, found["rows"])), "Bar")


def _bar(row: dict[str, Any]) -> list[str]:
    bar = f"at least {row['bar']:g}" if row.get("least") else f"{row['bar']:g}"
    if row["reached"] is None:
        return [row["what"], "not measured", bar, ""]
    return [row["what"], f"{row['value']:.3g}", bar, "yes" if row["reached"] else "no"]


def _bars(found: dict[str, Any], rows: list[list[str]], bar: str = "At most") -> str:
    hardware = found["hardware"]
    device = hardware.get("accelerator") or f"{hardware['cpu']}, {found['threads']} threads"
    versions = f"torch {found['versions']['torch']}, lightning {found['versions']['lightning']}"
    table = _table(["Figure", "Measured", bar, "Reached"], rows, 3)
    return f"{table}\n\nCosts: ratios of medians of interleaved rounds in one process; {device}; {versions}."


def _unlearning_bars() -> list[list[str]]:
    """What SalUn was to reach for random rows: gap to each of the two Retrains, FineTune's gap, time."""
    rows = Result.read(ROOT / method("salun").results).rows + Result.read(ROOT / method("fine-tune").results).rows
    runs: dict[str, dict[int, Any]] = {}
    for row in rows:
        if row.scenario.startswith("random"):
            runs.setdefault(row.run, {})[row.seed] = row

    def gap(run: str, reference: str) -> float:
        gaps = [
            metrics_gap(*({name: getattr(runs[each][seed], name) for name in METRICS} for each in (run, reference)))
            for seed in runs[run]
        ]
        return sum(gaps) / len(gaps)

    shares = [row.share_of_retrain for row in runs["SalUn"].values()]
    figures = [
        ("SalUn, random 10 %: gap to Retrain in points, mean of the seeds", gap("SalUn", "Retrain"), 1.5),
        ("the same to the other Retrain", gap("SalUn", "Retrain (another seed)"), 1.5),
        ("SalUn's gap over FineTune's", gap("SalUn", "Retrain") / gap("FineTune", "Retrain"), 1.0),
        ("SalUn's time, its mask included, as a share of Retrain's", sum(shares) / len(shares), 0.2),
    ]
    return [[what, f"{value:.3g}", f"{bar:g}", "yes" if value <= bar else "no"] for what, value, bar in figures]


def _gap(line: dict[str, Any]) -> str:
    if line["gap_mean"] is None:
        return "not measured"
    text = _number(line["gap_mean"], 2)
    each = line["gap_per_seed"]
    return f"{text} ({', '.join(_number(gap, 2) for gap in each)})" if len(each) > 1 else text


def _number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


#: forward passes at which the tables of curves are cut
BUDGETS = (1_000, 3_000, 10_000, 30_000, 100_000)


def _budgets(path: Path) -> str:
    """Accuracy of every run within budgets of forward passes."""
    if not path.is_file():
        return NOT_YET
    result = CurveResult.read(path)
    head = ["Training", "Passes a step", *(f"{budget:,}" for budget in BUDGETS), "At its end", "Passes to 85 %"]
    rows = []
    for run, curves in result.runs().items():
        within = [result.median_at(run, budget) for budget in BUDGETS]
        ends = statistics.median(curve.accuracy[-1] for curve in curves)
        reach = result.median_to_reach(run, 0.85)
        rows.append(
            [
                run,
                f"{statistics.median(curve.step_queries for curve in curves):,.0f}",
                *("" if value is None else f"{100.0 * value:.1f}" for value in within),
                f"{100.0 * ends:.1f} ({statistics.median(curve.queries[-1] for curve in curves):,.0f})",
                "not reached" if reach is None else f"{reach:,.0f}",
            ]
        )
    words = "Accuracy in percent within so many forward passes of a batch."
    return f"{_table(head, rows, numbers=len(head) - 1)}\n\n{_where(result)} {words}"


def _curves(entry: MethodEntry, page: Path) -> str:
    """The drawing of a method's curves, which stands beside its page."""
    if not (ROOT / entry.results).is_file():
        return NOT_YET
    return f"![Accuracy against forward passes]({os.path.relpath(_drawing_of(entry), page.parent)})"


def _drawing_of(entry: MethodEntry) -> Path:
    return (ROOT / entry.docs).with_suffix(".svg")


def drawings() -> dict[Path, str]:
    """Every drawing of the docs, made anew from its result."""
    found = {}
    for entry in METHODS:
        path = ROOT / entry.results
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("kind") == CurveResult.kind:
            found[_drawing_of(entry)] = drawing(CurveResult.read(path))
    return found


def _where(result: Result | RobustnessResult | TableResult | CurveResult) -> str:
    average = "medians" if isinstance(result, CurveResult) else "means"
    seeds = "seed" if len(result.seeds) == 1 else f"{average} over seeds"
    device = result.hardware.get("accelerator") or f"{result.hardware['cpu']}, {result.hardware['cores']} cores"
    versions = ", ".join(
        f"{name} {result.versions[name]}" for name in ("torch", "lightning") if name in result.versions
    )
    numbers = ", ".join(map(str, result.seeds))
    return f"{result.experiment}; {seeds} {numbers}; {device}; {versions}; {result.created[:10]}."


# -- what a class takes ------------------------------------------------------------------------------------------------
def _arguments(name: str) -> str:
    room = next(room for room in ROOMS if name in room.__all__)
    kind = getattr(room, name)
    words = _described(inspect.getdoc(kind) or "")
    rows = []
    for parameter in inspect.signature(kind).parameters.values():
        default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        if inspect.isfunction(parameter.default):
            # its words stand beside it; its address is another one each time
            default = "a function"
        rows.append([f"`{parameter.name}`", default, words[parameter.name]])
    return _table(["Argument", "Default", "What it is"], rows)


def _described(docstring: str) -> dict[str, str]:
    """Argument -> its words in a Google-style docstring, in Markdown."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", docstring + "\n", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: _markdown(" ".join(text.split())) for name, text in entries}


def _markdown(text: str) -> str:
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def main() -> None:
    """Rewrite the pages whose generated parts have changed."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text, page)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"updated {page.relative_to(ROOT)}")
    for path, content in drawings().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"updated {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
