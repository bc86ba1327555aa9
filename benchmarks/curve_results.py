"""Results of experiments as curves: written by benchmarks, drawn in the docs.

The format is written down in benchmarks/README.md.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.stored import StoredResult


@dataclass(frozen=True)
class Curve:
    """One run of one seed.

    Attributes:
        run: Its name in tables.
        seed: Seed.
        queries: Forward passes at each point, ascending.
        accuracy: Accuracy there, in [0, 1].
        step_queries: Forward passes a step.
        seconds: Seconds of the whole run, measurements left out.

    """

    run: str
    seed: int
    queries: Sequence[float]
    accuracy: Sequence[float]
    step_queries: float
    seconds: float

    def at(self, budget: float) -> float | None:
        """The accuracy at the last point within a budget of forward passes, or None where the first lies beyond."""
        within = [value for asked, value in zip(self.queries, self.accuracy, strict=True) if asked <= budget]
        return within[-1] if within else None

    def to_reach(self, accuracy: float) -> float | None:
        """Forward passes at the first point with an accuracy, or None."""
        return next((q for q, a in zip(self.queries, self.accuracy, strict=True) if a >= accuracy), None)


@dataclass(frozen=True)
class CurveResult(StoredResult):
    """One experiment whose runs are curves of accuracy against forward passes."""

    kind = "lightning_trust.curve_result"
    row = Curve

    def runs(self) -> dict[str, list[Curve]]:
        """Curves of all seeds by run."""
        found: dict[str, list[Curve]] = {}
        for curve in self.rows:
            found.setdefault(curve.run, []).append(curve)
        return found

    def median_at(self, run: str, budget: float) -> float | None:
        """Median over seeds of the accuracy within a budget; None unless every seed has a point there."""
        values = [curve.at(budget) for curve in self.runs()[run]]
        return None if any(value is None for value in values) else statistics.median(v for v in values if v is not None)

    def median_to_reach(self, run: str, accuracy: float) -> float | None:
        """Median over seeds of the forward passes to an accuracy; None unless every seed reaches it."""
        values = [curve.to_reach(accuracy) for curve in self.runs()[run]]
        return None if any(value is None for value in values) else statistics.median(v for v in values if v is not None)


_COLOURS = ("#1b6ca8", "#c8553d", "#3f8f4f", "#8a5fbf", "#b58900", "#444444", "#d16ba5", "#2aa198")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 780, 360, 52, 280, 16, 44


def drawing(result: CurveResult, names: Mapping[str, str] | None = None) -> str:
    """Accuracy against forward passes on a logarithmic axis, median over seeds, as an SVG of a few lines a curve.

    Written by hand: a plotting library's output changes with its version, and the docs are compared with what is
    committed.
    """
    runs = {run: curves for run, curves in result.runs().items() if names is None or run in names}
    points = [q for curves in runs.values() for curve in curves for q in curve.queries if q > 0]
    low, high = math.floor(math.log10(min(points))), math.ceil(math.log10(max(points)))

    def x(queries: float) -> float:
        share = (math.log10(queries) - low) / (high - low)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(accuracy: float) -> float:
        return round(_TOP + (1.0 - accuracy) * (_HEIGHT - _TOP - _BOTTOM), 1)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        ' font-family="sans-serif" font-size="12">',
        "<title>Accuracy against forward passes</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for tenth in range(0, 11, 2):
        level = y(tenth / 10)
        lines += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level}" y2="{level}" stroke="#dddddd"/>',
            f'<text x="{_LEFT - 6}" y="{level + 4}" text-anchor="end" fill="#555555">{tenth * 10}</text>',
        ]
    for exponent in range(low, high + 1):
        place = x(10.0**exponent)
        lines += [
            f'<line x1="{place}" x2="{place}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#eeeeee"/>',
            f'<text x="{place}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle" fill="#555555">'
            f'10<tspan dy="-4" font-size="9">{exponent}</tspan></text>',
        ]
    lines.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle" fill="#333333">'
        "forward passes of a batch</text>"
    )
    for place, (run, curves) in enumerate(runs.items()):
        # colours come a second time with dashes
        dashes = ' stroke-dasharray="6 3"' if place >= len(_COLOURS) else ""
        stroke = f'stroke="{_COLOURS[place % len(_COLOURS)]}"{dashes}'
        path = " ".join(f"{x(q)},{y(a)}" for q, a in _medians(curves))
        label = html.escape(run if names is None else names[run])
        row = _TOP + 12 + 20 * place
        lines += [
            f'<polyline points="{path}" fill="none" {stroke} stroke-width="2"/>',
            f'<line x1="{_WIDTH - _RIGHT + 14}" x2="{_WIDTH - _RIGHT + 34}" y1="{row - 4}" y2="{row - 4}"'
            f' {stroke} stroke-width="3"/>',
            f'<text x="{_WIDTH - _RIGHT + 40}" y="{row}" fill="#333333">{label}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _medians(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Median over seeds wherever one of them has a point, from where all have begun to where the first one ends.

    Seeds may have points at different places: steps of a pattern search differ in what they ask.
    """
    begin = max(next(q for q in curve.queries if q > 0) for curve in curves)
    end = min(curve.queries[-1] for curve in curves)
    places = sorted({q for curve in curves for q in curve.queries if begin <= q <= end})
    return [(q, statistics.median(curve.at(q) or 0.0 for curve in curves)) for q in places]
