"""The report as one HTML file that needs nothing else: text, tables and figures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from lightning_trust.core.files import write_text
from lightning_trust.core.records import METRICS, RunRecord
from lightning_trust.report.figures import confidence_panels, gap_bars, require_matplotlib, time_against_gap
from lightning_trust.report.prompting import prompt_sections
from lightning_trust.report.robustness import robust_sections
from lightning_trust.report.runs import Collection, Row, Scenario
from lightning_trust.report.table import gap_text, percent, rows_sentence, seconds, signed, spread_sentence

DEFINITIONS = {
    "UA": "unlearning accuracy: the share of forget rows that the model gets wrong (100 % minus its accuracy on them).",
    "RA": "remaining accuracy: accuracy on the training rows that are kept.",
    "TA": "test accuracy: accuracy on test rows; if a class is forgotten, without its rows.",
    "MIA": (
        "membership inference: the share of forget rows that an attacker, who knows the model's confidence on kept and"
        " on test rows, takes for rows it was never trained on."
    ),
    "Gap": (
        "the mean of the absolute differences of UA, RA, TA and MIA to Retrain, in percentage points; the first Retrain"
        " by path is the reference."
    ),
    "Retrain": "a new model trained from scratch without the forget rows: what unlearning tries to arrive at.",
    "Retrain spread": "the gap between Retrains that differ in their seed only: the yardstick for every other gap.",
    "Time": "optimizer steps and the passes that prepare them (such as a saliency mask), without evaluation.",
}

_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --muted: #59636e; --grid: #c9d0d7; --line: #e3e7eb;
  --forget: #0072b2; --test: #c14f00; --method: #0072b2; --neutral: #8a939c; --band: #e0a100; --best: #eef5fa; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --muted: #9aa4ae; --grid: #4a535c;
  --line: #2b3238; --forget: #56b4e9; --test: #f0975a; --method: #56b4e9; --neutral: #7d8790; --band: #d9a520;
  --best: #1b2833; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .4rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .2rem; }
p { margin: .5rem 0; max-width: 46rem; }
.muted, figcaption, .note { color: var(--muted); }
.note, figcaption { font-size: .875rem; max-width: 46rem; }
.headline { font-size: 1.1rem; }
.scroll { overflow-x: auto; margin: 1rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; width: 100%; }
th, td { text-align: right; padding: .34rem .5rem; white-space: nowrap; vertical-align: baseline; }
th { font-weight: 600; border-bottom: 1px solid var(--grid); }
th.metric { padding-right: 3.25rem; }
th:first-child, td:first-child { text-align: left; padding-left: .4rem; }
td.words { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tr.group td { border-top: 1px solid var(--line); }
tr.best td { background: var(--best); }
tr.best td:first-child, tr.best td.gap { font-weight: 650; }
td small { color: var(--muted); font-size: .82em; display: inline-block; min-width: 3.1em; }
figure { margin: 1rem 0 1.6rem; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; overflow: visible;
  font-family: inherit; }
.key { display: inline-block; width: .9em; height: .9em; vertical-align: -.1em; margin-right: .3em; }
.key.forget { background: color-mix(in srgb, var(--forget) 35%, transparent); border: 1.5px solid var(--forget); }
.key.test { height: 0; border-top: 2px solid var(--test); vertical-align: .25em; }
.key.before { height: 0; border-top: 2px dotted var(--ink); vertical-align: .25em; }
dt { font-weight: 600; float: left; clear: left; margin-right: .5em; }
dd { margin: 0 0 .35rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
li { margin: .25rem 0; }
code { font-size: .9em; overflow-wrap: anywhere; }
@media print { main { max-width: none; padding: 0; } figure { break-inside: avoid; } }
"""


def headline(scenario: Scenario) -> str:
    """What came out, in one or two sentences.

    Args:
        scenario: The runs of one forget set.

    """
    if scenario.reference is None:
        labels = ", ".join(row.label for row in scenario.rows() if row.kind == "method")
        return f"There is no Retrain to compare {labels} with, so the distance to it is not measured."
    best = scenario.best()
    if best is None or best.gap is None:
        return "Only Retrain was run; there is no method to compare with it yet."
    sentence = f"{best.label} is {best.gap:.1f} points from Retrain on average"
    spread = scenario.spread
    sentence += ";" if spread is None else f", two Retrains differ by {spread:.1f};"
    sentence += f" it took {percent(best.share)} of Retrain's time." if best.share is not None else ""
    sentence = sentence.rstrip(";") + ("" if sentence.endswith(".") else ".")
    originals = [row for row in scenario.rows() if row.kind == "original" and row.gap is not None]
    if len(originals) == 1:
        sentence += f" Before unlearning, the model was {originals[0].gap:.1f} points away."
    return sentence


def page(collection: Collection, title: str | None = None) -> str:
    """The whole page.

    Args:
        collection: What :func:`~lightning_trust.report.collect` found.
        title: Title of the page; after what it shows if None.

    Returns:
        One HTML document with its style and figures inside.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the error names the extra.

    """
    require_matplotlib()
    if title is None:
        kinds = {
            "Unlearning report": collection.scenarios,
            "Robustness report": collection.robust,
            "Prompting report": collection.prompts,
        }
        shown = [name for name, found in kinds.items() if found]
        title = shown[0] if len(shown) == 1 else "Report"
    parts = [f"<h1>{escape(title)}</h1>"]
    if collection.scenarios:
        parts += _unlearning(collection)
    if collection.robust:
        parts += robust_sections(collection.robust)
    if collection.prompts:
        parts += prompt_sections(collection.prompts)
    if collection.damaged:
        parts.append("<h2>Left out</h2><ul>")
        parts += [f"<li>{escape(message)}</li>" for message in collection.damaged.values()]
        parts.append("</ul>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _unlearning(collection: Collection) -> list[str]:
    scenarios = collection.scenarios
    records = [record for scenario in scenarios for record in scenario.records]
    parts = [
        f'<p class="muted">{_counted(len(records), "run")}, {_counted(len(scenarios), "forget set")}.'
        f" Last run ended {escape(max(record.created for record in records)[:16].replace('T', ' '))}.</p>",
        "<p>A trained model was asked to forget part of its training data. Each method below starts from that model;"
        " Retrain starts anew without the data. <strong>Closer to Retrain is better</strong>: a model that gets more"
        " forget rows wrong than Retrain does has unlearned"
        " too much.</p>",
    ]
    if len(scenarios) > 1:
        parts.append("<ul>")
        parts += [
            f'<li><a href="#{_anchor(scenario)}">Forget {escape(scenario.name)}</a>: {escape(headline(scenario))}</li>'
            for scenario in scenarios
        ]
        parts.append("</ul>")
    for scenario in scenarios:
        parts += _scenario(scenario)
    parts += _measured(records)
    parts.append("<h2>Definitions</h2><dl>")
    parts += [f"<dt>{term}</dt><dd>{escape(text)}</dd>" for term, text in DEFINITIONS.items()]
    parts.append("</dl>")
    return parts + _sources(collection)


def write_page(collection: Collection, path: str | Path, title: str | None = None) -> Path:
    """Write the page aside and rename it, so that a full disk or a killed process leaves the old page or none.

    Args:
        collection: What :func:`~lightning_trust.report.collect` found.
        path: Where the page shall stand.
        title: Title of the page; after what it shows if None.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the error names the extra.

    """
    return write_text(path, page(collection, title))


def _scenario(scenario: Scenario) -> list[str]:
    forget = scenario.forget
    parts = [
        f'<h2 id="{_anchor(scenario)}">Forget {escape(scenario.name)}</h2>',
        f'<p class="headline">{escape(headline(scenario))}</p>',
        f'<p class="muted">{escape(rows_sentence(scenario))}, chosen by <code>{escape(forget["spec"])}</code>.</p>',
        _table(scenario),
        '<p class="note">UA, RA, TA and MIA in percent, behind each the difference to Retrain in points.'
        f" Share is the time as a share of Retrain's. {escape(spread_sentence(scenario))}</p>",
    ]
    gaps = gap_bars(scenario)
    if gaps is not None:
        band = " The band is as wide as two Retrains differ." if scenario.spread is not None else ""
        parts.append(_figure("Distance to Retrain", gaps, f"Average gap of each run; grey is the model before.{band}"))
    times = time_against_gap(scenario)
    if times is not None:
        parts.append(
            _figure("Time against distance", times, "Lower and further left is better. Diamonds are Retrains.")
        )
    key = (
        '<span class="key forget"></span>forget rows &emsp;<span class="key test"></span>test rows'
        ' &emsp;<span class="key before"></span>forget rows before'
    )
    parts.append(
        _figure(
            "Confidence in the true label",
            confidence_panels(scenario),
            f"{key}<br>Softmax probability of the true label, share of rows on a logarithmic scale. A model that never"
            " saw the forget rows treats them as Retrain does: for a random subset, like test rows.",
            markup=True,
        )
    )
    return parts


def _figure(title: str, svg: str, caption: str, markup: bool = False) -> str:
    text = caption if markup else escape(caption)
    return f'<figure><h3>{escape(title)}</h3><figcaption>{text}</figcaption><div class="scroll">{svg}</div></figure>'


def _table(scenario: Scenario) -> str:
    rows = scenario.rows()
    sparse = any(row.sparsity is not None for row in rows)
    best = scenario.best()
    heads = ["Run", *METRICS, "Gap", "Time", "Share", *(["Sparse"] if sparse else [])]
    # the names stand above the values, not above the differences behind them
    metric = ' class="metric"' if scenario.reference is not None else ""
    cells = [f'<th scope="col"{metric if head in METRICS else ""}>{head}</th>' for head in heads]
    lines = ["<thead><tr>" + "".join(cells) + "</tr></thead>", "<tbody>"]
    kind = rows[0].kind
    for row in rows:
        classes = []
        if row.kind != kind:
            classes.append("group")
            kind = row.kind
        if best is not None and row.label == best.label:
            classes.append("best")
        cells = [f"<td>{escape(row.label)}</td>", *(_cell(row, name) for name in METRICS)]
        cells.append(f'<td class="gap{" muted" if row.gap is None or row.reference else ""}">{gap_text(row)}</td>')
        timed = row.seconds is not None
        cells.append(f"<td>{seconds(row.seconds) if row.seconds is not None else ''}</td>")
        cells.append(f"<td>{percent(row.share) if timed else ''}</td>")
        if sparse:
            cells.append(f"<td>{percent(row.sparsity) if row.sparsity is not None else ''}</td>")
        attribute = f' class="{" ".join(classes)}"' if classes else ""
        lines.append(f"<tr{attribute}>{''.join(cells)}</tr>")
    return '<div class="scroll"><table>' + "\n".join([*lines, "</tbody>"]) + "</table></div>"


def _cell(row: Row, name: str) -> str:
    difference = (
        "" if row.differences is None or row.reference else signed(row.differences[name]).replace("-", "&minus;")
    )
    small = f" <small>{difference}</small>" if row.differences is not None else ""
    return f"<td>{row.metrics[name]:.1f}{small}</td>"


def _measured(records: list[RunRecord]) -> list[str]:
    hosts = [record.hardware for record in records]
    machines = _distinct(
        f"{host.get('cpu', 'unknown CPU')}, {_counted(int(host.get('cores') or 0), 'core')} usable"
        + (f", {host['memory_gib']:g} GiB of memory" if host.get("memory_gib") else "")
        + f", {host.get('accelerator') or 'no accelerator'}"
        for host in hosts
    )
    software = _distinct(", ".join(f"{name} {value}" for name, value in record.versions.items()) for record in records)
    attack = _distinct(
        f"feature {record.membership['feature']}, at most {record.membership['rows']:,} rows a side"
        + (f"; {record.membership['note']}" if record.membership["note"] else "")
        for record in records
    )
    seeds = sorted({record.seed for record in records if record.seed is not None})
    seed_text = ", ".join(str(seed) for seed in seeds) or "none fixed"
    if any(record.seed is None for record in records) and seeds:
        seed_text += "; some runs without a fixed seed"
    sizes = _distinct(f"{record.parameters:,} parameters" for record in records)
    lines = {
        "Membership inference": attack,
        "Seeds": [seed_text],
        "Network": sizes,
        "Hardware": machines,
        "Versions": software,
    }
    parts = ["<h2>How it was measured</h2>", "<dl>"]
    parts += [f"<dt>{term}</dt><dd>{escape('; or '.join(values))}</dd>" for term, values in lines.items()]
    return [
        *parts,
        "</dl>",
        '<p class="note">Accuracies are taken in evaluation mode on rows without augmentation. Times compare runs of'
        " one machine only.</p>",
    ]


def _sources(collection: Collection) -> list[str]:
    lines = ['<h2>Runs</h2><div class="scroll"><table><thead><tr>']
    lines += [f'<th scope="col">{head}</th>' for head in ("Run", "Seed", "Fit", "Ended", "Record")]
    lines.append("</tr></thead><tbody>")
    for scenario in collection.scenarios:
        for run in scenario.runs:
            record = run.record
            seed = "-" if record.seed is None else str(record.seed)
            place = run.path
            if place.is_absolute() and place.is_relative_to(Path.cwd()):
                place = Path(os.path.relpath(place))
            lines.append(
                f"<tr><td>{escape(record.label)}</td><td>{seed}</td><td>{seconds(record.seconds['fit'])}</td>"
                f"<td>{escape(record.created[:16].replace('T', ' '))}</td>"
                f'<td class="words"><code>{escape(str(place))}</code></td></tr>'
            )
    return [*lines, "</tbody></table></div>"]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _anchor(scenario: Scenario) -> str:
    return f"forget-{escape(scenario.forget['hash'])}"
