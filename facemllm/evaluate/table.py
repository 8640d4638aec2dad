"""Results for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from facemllm.scoring import metrics
from facemllm.scoring.metrics import CLOSED_MEAN, clears_majority
from facemllm.tasks import ZERO_SHOT


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
        _add(table, f"{name} (held out of training)" if name == ZERO_SHOT else name, entry)
        for item, figure in (entry.get("items") or {}).items():
            _add(table, f"  {item}", figure)
    if said := [*_consistency(summary.get("trust") or {}), *_gaps(summary.get("trust") or {})]:
        table.caption = "\n".join(said)
        table.caption_justify = "left"
    return table


def _consistency(trust: Mapping[str, Any]) -> Iterator[str]:
    shares = trust.get("consistency") or {}
    if (shares.get("model") or {}).get("value") is not None:
        labels = (shares.get("truth") or {}).get("value")
        labels = "" if labels is None else f" (the labels {labels:.1%})"
        yield f"broken logical relations: {shares['model']['value']:.1%}{labels}"
    captions = shares.get("captions") or {}
    if (captions.get("model") or {}).get("value") is not None:
        yield f"captions that contradict an answer: {captions['model']['value']:.1%}"


def _gaps(trust: Mapping[str, Any]) -> Iterator[str]:
    gaps = trust.get("gaps") or {}
    if gap := gaps.get("surest"):
        between = f"{gap['a']} – {gap['b']} {gap['value']:+.3f}"
        told = escape(f"{gap['task']} by {gap['kind']}, {between} [{gap['low']:+.3f}, {gap['high']:+.3f}]")
        yield f"gaps between groups of people: shown in {gaps['shown']} of {gaps['compared']}; the surest: {told}"
    elif gaps.get("compared"):
        yield f"gaps between groups of people: none shown in {gaps['compared']} comparisons"


def _add(table: Table, name: str, figure: Mapping[str, Any]) -> None:
    digits = metrics.get(figure["metric"]).digits

    def show(value: float | None) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    unit = figure.get("unit") if metrics.get(figure["metric"]).in_unit else None
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
