"""Robustness records as tables, curves and example images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from lightning_trust.core.files import read_tensors
from lightning_trust.core.robustness_record import EXAMPLES_KIND, RobustnessRecord
from lightning_trust.report.figures import accuracy_curves
from lightning_trust.report.runs import RobustRun

ROBUST_CAPTION = (
    "Accuracy in percent; union: correct under every attack. Intervals: 95 %, Wilson. A union that differs by less than"
    " the intervals is no difference."
)
_SHOWN = 8  # examples a run


def names_of(runs: Sequence[RobustRun]) -> list[str]:
    """A name a run: its label, with what tells runs of one label apart."""
    names = []
    for run in runs:
        same = [other for other in runs if other.record.label == run.record.label]
        seeds = [other.record.seed for other in same]
        if len(same) == 1:
            names.append(run.record.label)
        elif run.record.seed is not None and len(set(seeds)) == len(seeds):
            names.append(f"{run.record.label}, seed {run.record.seed}")
        else:
            names.append(f"{run.record.label}, {run.path.parent.name}")
    return names


def attacks_of(runs: Sequence[RobustRun]) -> list[str]:
    """Names of all attacks, in the order in which they come first."""
    return list(dict.fromkeys(name for run in runs for name in run.record.attacks))


def _ordered(runs: Sequence[RobustRun]) -> list[tuple[str, RobustRun]]:
    """The most robust one first."""
    named = zip(names_of(runs), runs, strict=True)
    return sorted(named, key=lambda each: -each[1].record.accuracy["union"]["value"])


def _cells(record: RobustnessRecord, attacks: Sequence[str]) -> list[tuple[str, str]]:
    """Value and interval of clean, each attack and union; empty where an attack was not run."""
    cells = []
    for name in ["clean", *attacks, "union"]:
        values = record.accuracy.get(name)
        if values is None:
            cells.append(("", ""))
        else:
            cells.append((f"{100 * values['value']:.1f}", f"{100 * values['low']:.1f} to {100 * values['high']:.1f}"))
    return cells


def robust_table(runs: Sequence[RobustRun]) -> Table:
    """The runs as a table for the terminal."""
    attacks = attacks_of(runs)
    table = Table(title="Robustness", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("Run", "Clean", *attacks, "Union", "95 % interval", "n"):
        table.add_column(head, justify="left" if head == "Run" else "right")
    for name, run in _ordered(runs):
        cells = _cells(run.record, attacks)
        table.add_row(name, *(value for value, _ in cells), cells[-1][1], str(run.record.samples))
    return table


def robust_markdown(runs: Sequence[RobustRun]) -> str:
    """The runs as a Markdown table."""
    attacks = attacks_of(runs)
    head = ["Run", "Clean", *attacks, "Union", "95 % interval", "n"]
    lines = ["**Robustness**", "", " | ".join(["", *head, ""]).strip()]
    lines.append("| --- |" + " ---: |" * (len(head) - 1))
    for name, run in _ordered(runs):
        cells = _cells(run.record, attacks)
        row = [name, *(value for value, _ in cells), cells[-1][1], str(run.record.samples)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join([*lines, "", ROBUST_CAPTION, ""])


def robust_sections(runs: Sequence[RobustRun]) -> list[str]:
    """The runs as parts of the HTML page."""
    ordered = _ordered(runs)
    best_name, best = ordered[0][0], ordered[0][1].record.accuracy["union"]
    parts = [
        '<h2 id="robustness">Robustness</h2>',
        f'<p class="headline">{escape(best_name)} holds {100 * best["value"]:.1f} % of its samples against every attack'
        f" (95 % interval {100 * best['low']:.1f} to {100 * best['high']:.1f}).</p>",
        _html_table(ordered, attacks_of(runs)),
        f'<p class="note">{escape(ROBUST_CAPTION)}</p>',
    ]
    curves = accuracy_curves([(name, run.record) for name, run in ordered])
    if curves is not None:
        parts.append(
            "<figure><h3>Accuracy against the radius</h3><figcaption>A sample broken in a small ball is broken in a"
            f' large one.</figcaption><div class="scroll">{curves}</div></figure>'
        )
    for name, run in ordered:
        parts += _examples(name, run)
    parts += _attacks(ordered)
    return parts


def _html_table(ordered: Sequence[tuple[str, RobustRun]], attacks: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in ("Run", "Clean", *attacks, "Union", "n"))
    lines = [f"<thead><tr>{heads}</tr></thead>", "<tbody>"]
    for place, (name, run) in enumerate(ordered):
        cells = "".join(
            f"<td>{value} <small>{interval}</small></td>" if value else "<td></td>"
            for value, interval in _cells(run.record, attacks)
        )
        best = ' class="best"' if place == 0 and len(ordered) > 1 else ""
        lines.append(f"<tr{best}><td>{escape(name)}</td>{cells}<td>{run.record.samples:,}</td></tr>")
    return '<div class="scroll"><table>' + "\n".join([*lines, "</tbody>"]) + "</table></div>"


def _attacks(ordered: Sequence[tuple[str, RobustRun]]) -> list[str]:
    said: dict[str, str] = {}
    for _, run in ordered:
        for name, attack in run.record.attacks.items():
            said.setdefault(f"{name}: {attack['attack']}", "")
    rows = "".join(f"<li><code>{escape(text)}</code></li>" for text in said)
    files = "".join(f"<li>{escape(name)}: <code>{escape(str(run.path))}</code></li>" for name, run in ordered)
    return ["<h3>Attacks</h3>", f"<ul>{rows}</ul>", "<h3>Records</h3>", f"<ul>{files}</ul>"]


def _examples(name: str, run: RobustRun) -> list[str]:
    if run.record.examples is None:
        return []
    path = run.path.parent / run.record.examples
    try:
        tensors, _ = read_tensors(path, EXAMPLES_KIND, 1)
    except (OSError, ValueError):
        return [f'<p class="note">{escape(name)}: the example inputs in {escape(str(path))} cannot be read.</p>']
    clean = tensors["clean"]
    if clean.ndim != 4 or clean.shape[1] not in (1, 3):
        return []
    parts = [f"<h3>{escape(name)}: examples</h3>"]
    for key, adversarial in tensors.items():
        attack = key.removeprefix("adversarial/")
        if attack == key:
            continue
        predicted = tensors[f"predicted/{attack}"].tolist()
        targets = tensors["targets"].tolist()
        count = min(_SHOWN, len(adversarial))
        words = ", ".join(f"{true} as {found}" for true, found in zip(targets[:count], predicted[:count], strict=True))
        image = _strip(clean[:count], adversarial[:count])
        same = (clean[:count] == adversarial[:count]).flatten(1).all(dim=1)
        held = " Where nothing was added, the attack found nothing." if bool(same.any()) else ""
        parts.append(
            f"<figure><figcaption>{escape(attack)}: inputs, adversarial inputs, and what was added (grey is nothing,"
            f" scaled to its largest). True class and prediction: {escape(words)}.{held}</figcaption>"
            f'<div class="scroll"><img alt="{escape(attack)} on {escape(name)}" src="data:image/png;base64,{image}"'
            f' style="image-rendering: pixelated; width: {72 * count}px"></div></figure>'
        )
    return parts


def _strip(clean: Tensor, adversarial: Tensor) -> str:
    """Three rows of images as a PNG in base64: clean, adversarial, difference."""
    from matplotlib.image import imsave

    low, high = float(clean.min()), max(float(clean.max()), float(clean.min()) + 1e-12)
    delta = adversarial - clean
    largest = max(float(delta.abs().max()), 1e-12)
    rows = [(clean - low) / (high - low), (adversarial - low) / (high - low), 0.5 + 0.5 * delta / largest]
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(0.0, 1.0)
    picture = grid.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    imsave(file, picture, format="png")
    return base64.b64encode(file.getvalue()).decode()
