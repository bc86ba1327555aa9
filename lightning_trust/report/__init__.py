"""Compare runs: tables for terminal and Markdown, and one HTML page."""

from __future__ import annotations

from lightning_trust.report.page import headline, page, write_page
from lightning_trust.report.robustness import robust_markdown
from lightning_trust.report.runs import Collection, PromptRun, RobustRun, Row, Run, Scenario, collect
from lightning_trust.report.table import markdown, print_collection, scenario_table

__all__ = [
    "Collection",
    "PromptRun",
    "RobustRun",
    "Row",
    "Run",
    "Scenario",
    "collect",
    "headline",
    "markdown",
    "page",
    "print_collection",
    "robust_markdown",
    "scenario_table",
    "write_page",
]
