"""Scenarios -> tables for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lightning_trust.core.records import METRICS
from lightning_trust.report.prompting import prompt_line
from lightning_trust.report.robustness import ROBUST_CAPTION, robust_table
from lightning_trust.report.runs import Collection, Row, Scenario

NOT_MEASURED = "not measured"
_WIDE = 108  # columns from which value and difference fit on one line


def signed(value: float) -> str:
    """A difference in points with its sign, as text.

    Example:
        >>> signed(0.5), signed(-1.26), signed(-0.001)
        ('+0.5', '-1.3', '0.0')

    """
    text = f"{value:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text


def seconds(value: float) -> str:
    """A duration with two significant digits or more.

    Example:
        >>> seconds(0.0123), seconds(4.5678), seconds(48.3), seconds(12345.6)
        ('0.012 s', '4.6 s', '48 s', '12,346 s')

    """
    if value < 0.995:
        return f"{value:.2g} s"
    return f"{value:.1f} s" if value < 9.95 else f"{value:,.0f} s"


def percent(value: float | None) -> str:
    """A share as a percentage; a dash where there is none.

    Example:
        >>> percent(0.123), percent(0.004), percent(0.95), percent(None)
        ('12 %', '0.4 %', '95 %', '-')

    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if 0 < value < 0.0995 else f"{100 * value:.0f} %"


def gap_text(row: Row) -> str:
    """The average gap of a line in words or points."""
    if row.gap is None:
        return NOT_MEASURED
    return "reference" if row.reference else f"{row.gap:.2f}"


def spread_sentence(scenario: Scenario) -> str:
    """What the yardstick is: the gap between Retrains, or why there is none."""
    if scenario.reference is None:
        return "No Retrain with this forget set among the runs: gaps are not measured."
    spread = scenario.spread
    if spread is None:
        return "Retrain spread not measured: it needs a second Retrain with another seed."
    count = sum(row.kind == "retrain" for row in scenario.rows())
    retrains = "two Retrains differ" if count == 2 else f"the other {count - 1} Retrains differ from the first"
    return f"Retrain spread: {retrains} by {spread:.2f} points on average. A gap near it cannot be told from chance."


def rows_sentence(scenario: Scenario) -> str:
    """How many rows there are to forget, to keep and to test on."""
    forget = scenario.forget
    return f"{forget['forget']:,} rows to forget, {forget['retain']:,} to keep, {forget['test']:,} to test on"


CAPTION = (
    "UA, RA, TA, MIA in percent; behind each, the difference to Retrain in points. Closer to Retrain is better:"
    " a larger UA or MIA is not. Gap: mean of the four absolute differences. Time: optimizer steps and the passes that"
    " prepare them, without evaluation. Share: that time as a share of Retrain's."
)


def scenario_table(scenario: Scenario, width: int = 120) -> Table:
    """One scenario as a rich table.

    Args:
        scenario: The runs of one forget set.
        width: Columns of the terminal; under 108 the differences stand below the values, not beside them.

    """
    wide = width >= _WIDE
    table = Table(
        title=f"Forget {scenario.name}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 2, 0, 0) if wide else (0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("Run", overflow="fold", min_width=16)
    for name in METRICS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Gap", justify="right", no_wrap=not any(row.gap is None for row in scenario.rows()))
    table.add_column("Time", justify="right", no_wrap=True)
    table.add_column("Share", justify="right", no_wrap=True)
    rows = scenario.rows()
    sparse = any(row.sparsity is not None for row in rows)
    if sparse:
        table.add_column("Sparse", justify="right", no_wrap=True)
    best = scenario.best()
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.kind != row.kind:
            table.add_section()
        style = "bold" if best is not None and row.label == best.label else ""
        gap = Text(gap_text(row), style=style if row.gap is not None and not row.reference else "dim")
        cells = [
            Text(row.label, style=style),
            *(_cell(row, name, wide) for name in METRICS),
            gap,
            Text("" if row.seconds is None else seconds(row.seconds)),
            Text("" if row.seconds is None else percent(row.share)),
        ]
        if sparse:
            cells.append(Text("" if row.sparsity is None else percent(row.sparsity)))
        table.add_row(*cells)
    return table


def _cell(row: Row, name: str, wide: bool) -> Text:
    value = Text(f"{row.metrics[name]:.1f}")
    if row.differences is None:
        return value
    difference = "" if row.reference else signed(row.differences[name])
    if wide:
        # a no-break space is not trimmed, so that the values of all lines stand in one column
        return value.append(f" {difference:>5}".replace(" ", "\N{NO-BREAK SPACE}"), style="dim")
    return value.append(f"\n{difference}", style="dim") if difference else value


def print_collection(collection: Collection, console: Console | None = None) -> None:
    """Print the tables of all scenarios, what they mean, and the damaged records.

    Args:
        collection: What :func:`~lightning_trust.report.collect` found.
        console: Where to print; by default the terminal.

    """
    console = console or Console()
    for scenario in collection.scenarios:
        console.print(
            Group(
                scenario_table(scenario, console.width),
                Text(rows_sentence(scenario) + ". " + spread_sentence(scenario), style="italic"),
                Text(),
            )
        )
    if collection.scenarios:
        console.print(Text(CAPTION, style="dim"))
    if collection.robust:
        console.print(robust_table(collection.robust))
        console.print(Text(ROBUST_CAPTION, style="dim"))
    if collection.prompts:
        console.print(Text("Prompts", style="bold"))
    for run in collection.prompts:
        console.print(Text(prompt_line(run)), soft_wrap=True)
    for message in collection.damaged.values():
        console.print(Text(f"Left out: {message}", style="bold red"))


def markdown(scenario: Scenario) -> str:
    """One scenario as a Markdown table with its caption, for a README or a docs page."""
    rows = scenario.rows()
    sparse = any(row.sparsity is not None for row in rows)
    best = scenario.best()
    head = ["Run", *METRICS, "Gap", "Time", "Share", *(["Sparse"] if sparse else [])]
    lines = [
        f"**Forget {scenario.name}** ({rows_sentence(scenario)})",
        "",
        _line(head),
        _line(["---", *["---:"] * (len(head) - 1)]),
    ]
    for row in rows:
        cells = [row.label]
        for name in METRICS:
            difference = "" if row.differences is None or row.reference else f" ({signed(row.differences[name])})"
            cells.append(f"{row.metrics[name]:.1f}{difference}")
        cells.append(gap_text(row))
        cells += ["", ""] if row.seconds is None else [seconds(row.seconds), percent(row.share)]
        if sparse:
            cells.append("" if row.sparsity is None else percent(row.sparsity))
        if best is not None and row.label == best.label:
            cells[0], cells[5] = f"**{cells[0]}**", f"**{cells[5]}**"
        lines.append(_line(cells))
    return "\n".join([*lines, "", spread_sentence(scenario), "", CAPTION, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
