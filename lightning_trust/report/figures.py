"""The figures of the report page as inline SVG whose colours follow the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_trust.core.records import RunRecord
from lightning_trust.core.robustness_record import RobustnessRecord
from lightning_trust.report.runs import Row, Scenario

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib draws in stand-in colours; the page's style sheet gives each its value, light and dark
_COLOURS = {
    "ink": "#0a0b01",
    "muted": "#0a0b02",
    "grid": "#0a0b03",
    "forget": "#0a0b04",
    "test": "#0a0b05",
    "method": "#0a0b06",
    "neutral": "#0a0b07",
    "band": "#0a0b08",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_trust",
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _COLOURS["grid"],
    "axes.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.titlecolor": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.labelsize": 8.0,
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["grid"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.color": _COLOURS["grid"],
    "ytick.labelcolor": _COLOURS["muted"],
    "axes.grid": False,
    "grid.color": _COLOURS["grid"],
}
# title, edges, counts of forget and test rows, the same before the run
_Panel = tuple[str, Sequence[float], Mapping[str, Sequence[int]], Mapping[str, Sequence[int]] | None]
_WIDTH = 7.2  # inches; the page scales the drawing to its column


def require_matplotlib() -> None:
    """Raise, naming the extra, where matplotlib is not installed.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.

    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The report page draws its figures with matplotlib: pip install "lightning_trust[report]"',
            name="matplotlib",
        ) from error


def gap_bars(scenario: Scenario) -> str | None:
    """Average gap of the original and every method, the Retrain spread as a band; ``None`` without a Retrain."""
    rows = [row for row in scenario.rows() if row.kind != "retrain" and row.gap is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: row.gap or 0.0, reverse=True)
    with _style():
        figure = _figure(0.32 * len(rows) + 0.75)
        axes = figure.add_subplot()
        widest = max(max(row.gap or 0.0 for row in rows), scenario.spread or 0.0) or 1.0
        if scenario.spread is not None:
            axes.axvspan(0, scenario.spread, color=_COLOURS["band"], alpha=0.3, linewidth=0)
            axes.axvline(scenario.spread, color=_COLOURS["band"], linewidth=1.2, zorder=3)
            axes.annotate(
                f"Retrain spread {scenario.spread:.2f}",
                (scenario.spread, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="left",
                va="bottom",
                color=_COLOURS["muted"],
            )
        for place, row in enumerate(rows):
            gap = row.gap or 0.0
            colour = _COLOURS["neutral" if row.kind == "original" else "method"]
            axes.barh(place, gap, height=0.62, color=colour)
            axes.text(gap + widest / 100, place, f"{gap:.2f}", va="center")
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=_COLOURS["ink"])
        axes.set_xlim(0, widest * 1.1)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("average gap to Retrain, points (shorter is better)", loc="left")
        axes.spines["left"].set_visible(False)
        return _svg(figure, f"gap-{scenario.forget['hash']}", f"Average gap to Retrain, forget {scenario.name}")


def confidence_panels(scenario: Scenario) -> str:
    """Histograms of the true label's probability, forget rows against test rows, before and after, one panel a run."""
    panels = _panels(scenario)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    with _style():
        figure = _figure(1.35 * lines + 0.45)
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, edges, counts, before) in zip(grid.flat, panels, strict=False):
            _confidence(axes, edges, counts, before)
            axes.set_title(title, pad=3)
        for place, axes in enumerate(grid.flat[: len(panels)]):
            # the panel below may be one of those that are hidden
            axes.tick_params(labelbottom=place + columns >= len(panels), length=2)
        return _svg(
            figure,
            f"confidence-{scenario.forget['hash']}",
            f"Confidence on forget and test rows, forget {scenario.name}",
        )


def time_against_gap(scenario: Scenario) -> str | None:
    """Seconds (logarithmic) against the average gap, one labelled point a run; ``None`` without a Retrain."""
    rows = [row for row in scenario.rows() if row.gap is not None and row.seconds]
    if not any(row.kind == "method" for row in rows):
        return None
    with _style():
        figure = _figure(2.9)
        axes = figure.add_subplot()
        times = [row.seconds or 0.0 for row in rows]
        highest = max(row.gap or 0.0 for row in rows) or 1.0
        if scenario.spread is not None:
            axes.axhspan(0, scenario.spread, color=_COLOURS["band"], alpha=0.3, linewidth=0)
        axes.set_xscale("log")
        # room for labels to the right of the last point, and at least a decade so that the axis has ticks
        low, high = min(times) / 1.4, max(times) * 1.6
        high = max(high, low * 12)
        axes.set_xlim(low, high)
        axes.set_ylim(-0.06 * highest, highest * 1.12)
        for row in rows:
            retrain = row.kind == "retrain"
            axes.plot(
                row.seconds or 0.0,
                row.gap or 0.0,
                marker="D" if retrain else "o",
                markersize=5,
                linestyle="none",
                color=_COLOURS["neutral" if retrain else "method"],
                clip_on=False,
            )
        _direct_labels(axes, rows)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g} s" if f"{value:e}"[0] in "25" else "")
        axes.tick_params(which="both", length=3, pad=3)
        axes.set_xlabel("time of steps and passes, logarithmic", loc="left")
        axes.set_title("average gap to Retrain, points (lower is better)", color=_COLOURS["muted"])
        return _svg(figure, f"time-{scenario.forget['hash']}", f"Time against average gap, forget {scenario.name}")


def _direct_labels(axes: Axes, rows: Sequence[Row]) -> None:
    """Write every label beside its point, where it covers no point and no other label if there is such a place."""
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    width, height = 6.4, 2.2  # inches inside the axes, near enough
    line, letter, gap = 0.14, 0.063, 0.1
    points = {
        id(row): (
            width * math.log((row.seconds or low) / low) / math.log(high / low),
            height * ((row.gap or 0.0) - bottom) / (top - bottom),
        )
        for row in rows
    }
    taken = [(x - 0.05, x + 0.05, y - 0.05, y + 0.05) for x, y in points.values()]
    for row in sorted(rows, key=lambda row: -(row.gap or 0.0)):
        x, y = points[id(row)]
        length = letter * len(row.label)
        places = []
        for shift in (0.0, line, -line, 2 * line, -2 * line):
            for right in (False, True):
                start = x - gap - length if right else x + gap
                box = (start, start + length, y + shift - line / 2, y + shift + line / 2)
                hidden = sum(
                    box[0] < other[1] and other[0] < box[1] and box[2] < other[3] and other[2] < box[3]
                    for other in taken
                )
                outside = box[0] < 0 or box[1] > width + 0.4
                places.append((10 * outside + hidden, abs(shift), right, shift, box))
        _, _, right, shift, box = min(places)
        taken.append(box)
        axes.annotate(
            row.label,
            (row.seconds or low, row.gap or 0.0),
            xytext=(-72 * gap if right else 72 * gap, 72 * shift),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            annotation_clip=False,
        )


def _panels(scenario: Scenario) -> list[_Panel]:
    labels = {id(row.record): row.label for row in scenario.rows() if row.record is not None}
    order = {id(row.record): place for place, row in enumerate(scenario.rows())}
    records = sorted(scenario.records, key=lambda record: order[id(record)])
    starts: list[tuple[Mapping[str, Any], list[RunRecord]]] = []
    for record in records:
        before = record.confidence["before"]
        if before is None:
            continue
        for counts, members in starts:
            if dict(counts) == dict(before):
                members.append(record)
                break
        else:
            starts.append((before, [record]))
    panels: list[_Panel] = []
    for counts, members in starts:
        title = "Before" if len(starts) == 1 else f"Before {labels[id(members[0])]}"
        panels.append((title, members[0].confidence["edges"], counts, None))
    for record in records:
        confidence = record.confidence
        panels.append((labels[id(record)], confidence["edges"], confidence["after"], confidence["before"]))
    return panels


def _confidence(
    axes: Axes,
    edges: Sequence[float],
    counts: Mapping[str, Sequence[int]],
    before: Mapping[str, Sequence[int]] | None,
) -> None:
    floor = 0.05
    axes.stairs(
        _shares(counts["forget"], floor), edges, baseline=floor, fill=True, color=_COLOURS["forget"], alpha=0.35
    )
    forget = _shares(counts["forget"], floor)
    axes.stairs(forget, edges, baseline=floor, fill=True, color=_COLOURS["forget"], alpha=0.35)
    axes.stairs(forget, edges, baseline=None, color=_COLOURS["forget"], linewidth=1.1)
    axes.stairs(_shares(counts["test"], floor), edges, baseline=None, color=_COLOURS["test"], linewidth=1.1)
    if before is not None:
        shares = _shares(before["forget"], floor)
        axes.stairs(shares, edges, baseline=None, color=_COLOURS["ink"], linewidth=0.9, linestyle=(0, (1, 1.5)))
    axes.set_yscale("log")
    axes.set_ylim(floor, 130)
    axes.set_yticks([0.1, 1, 10, 100], ["0.1 %", "1 %", "10 %", "100 %"])
    axes.minorticks_off()
    axes.set_xlim(edges[0], edges[-1])
    if (edges[0], edges[-1]) == (0.0, 1.0):
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _shares(counts: Sequence[int], floor: float) -> list[float]:
    total = sum(counts) or 1
    return [max(100 * count / total, floor) for count in counts]


def accuracy_curves(runs: Sequence[tuple[str, RobustnessRecord]]) -> str | None:
    """Accuracy against the radius, a panel an attack and a line a run; ``None`` where nobody measured any."""
    attacks = list(dict.fromkeys(name for _, record in runs for name in record.curves))
    if not attacks:
        return None
    colours = ["method", "test", "band", "neutral", "ink"]
    with _style():
        figure = _figure(2.4)
        grid = figure.subplots(1, len(attacks), sharey=True, squeeze=False)
        for axes, attack in zip(grid[0], attacks, strict=True):
            for place, (name, record) in enumerate(runs):
                points = _curve(record, attack)
                if points:
                    axes.plot(
                        [eps for eps, _ in points],
                        [100 * accuracy for _, accuracy in points],
                        marker=".",
                        color=_COLOURS[colours[place % len(colours)]],
                        linestyle=("-", "--", ":")[place // len(colours) % 3],
                        label=name,
                    )
            axes.set_title(attack, pad=3)
            axes.set_xlabel("eps")
            axes.set_ylim(0, 100)
        grid[0][0].set_ylabel("accuracy, %")
        grid[0][-1].legend(frameon=False, fontsize=7)
        return _svg(figure, "accuracy-curves", "Accuracy against the radius of the attack")


def _curve(record: RobustnessRecord, attack: str) -> list[tuple[float, float]]:
    """Points of a curve, the attack's own radius among them."""
    points = {float(eps): float(accuracy) for eps, accuracy in record.curves.get(attack, ())}
    eps = record.attacks[attack]["eps"] if attack in record.attacks else None
    if points and eps is not None:
        points[float(eps)] = record.accuracy[attack]["value"]
    return sorted(points.items())


def _style() -> Any:
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def _figure(height: float) -> Figure:
    # not through pyplot, which keeps figures and chooses a window system
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _svg(figure: Figure, name: str, description: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for variable, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    # one font for page and figures; identifiers that no other figure on the page has
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    prefix = re.sub(r"\W", "-", name)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    escaped = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = re.sub(r' (width|height)="[^"]*"', "", text[: text.index(">")])
    return f'{head} role="img" aria-label="{escaped}">{text[text.index(">") + 1 :]}'.strip()
