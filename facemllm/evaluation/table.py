"""Results for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from facemllm.scoring.metrics import CLOSED_MEAN, clears_majority


def results_table(summary: Mapping[str, Any]) -> Table:
    """Tasks with their items beneath, from `summary.json` or `metrics.json`; dim where the majority is not cleared."""
    table = Table(title="held-out results", title_justify="left", pad_edge=False, box=None)
    table.add_column("task")
    table.add_column("metric", style="cyan")
    for name in ("value", "95 %", "majority", "pixels", "unparsed", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    if closed := summary.get(CLOSED_MEAN):
        _add(table, "all closed questions", closed)
    for name, entry in (summary.get("tasks") or {}).items():
        _add(table, name, entry)
        for item, figure in (entry.get("items") or {}).items():
            _add(table, f"  {item}", figure)
    return table


def _add(table: Table, name: str, figure: Mapping[str, Any]) -> None:
    digits = 3 if figure["higher_is_better"] else 2

    def show(value: float | None) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    unit = figure.get("unit") if figure["metric"] == "mae" else None
    table.add_row(
        escape(name),
        escape(f"{figure['metric']} ({unit})" if unit else figure["metric"]),
        show(figure["value"]),
        f"{show(figure['low'])} {show(figure['high'])}",
        *(show(figure["baselines"].get(rival)) for rival in ("majority", "pixels")),
        f"{figure.get('unparsed') or 0:.1%}",
        str(figure.get("n", "")),
        style=None if clears_majority(figure) else "dim",
    )
