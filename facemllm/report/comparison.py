"""The page of a comparison of two runs, one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write
from facemllm.report.kit import render
from facemllm.scoring.figures import measure
from facemllm.scoring.metrics import CLOSED_MEAN
from facemllm.scoring.paired import SAME, by_group, by_task, by_verdict

Entry = Mapping[str, Any]
"""A paired figure with its verdict (`scoring.paired`)."""


def head(task: str) -> str:
    """What the figure of a task is called."""
    return "all closed questions" if task == CLOSED_MEAN else task


def write_page(out: Path, comparison: Mapping[str, Any]) -> None:
    """Write a comparison (`compare.compare`) as a page; whole or not at all."""
    atomic_write(out, page(comparison).encode())


def page(comparison: Mapping[str, Any]) -> str:
    """A comparison as HTML."""
    figures, groups = list(by_task(comparison["figures"])), list(by_group(comparison["groups"]))
    items = {task: [(item, e) for name, item, e in figures if item and name == task] for task, _, _ in figures}
    shown = [(f"{task}, {kind}: {name}", e) for task, kind, name, e in groups if e["verdict"] != SAME]
    every = {task: [(f"{kind}: {name}", e) for owner, kind, name, e in groups if owner == task] for task, *_ in groups}
    return render(
        "comparison.html.jinja",
        comparison=comparison,
        verdicts={verdict: names for verdict, names in by_verdict(comparison).items() if names},
        heads=_rows([(head(task), entry) for task, item, entry in figures if not item]),
        items={task: _rows(own) for task, own in items.items() if own},
        shown=_rows(shown),
        groups={task: _rows(own) for task, own in every.items()},
    )


def _rows(entries: list[tuple[str, Entry]]) -> list[dict[str, Any]]:
    """Rows on one scale a unit, so that bars beneath each other compare: `reach` is where it ends, either way."""
    reach: dict[str, float] = {}
    for _, entry in entries:
        ends = [abs(entry["difference"][end] or 0.0) for end in ("value", "low", "high")]
        reach[entry["unit"]] = max(reach.get(entry["unit"], 0.0), *ends)
    return [
        {"name": name, "entry": entry, "measure": measure(entry), "reach": reach[entry["unit"]] * 1.05}
        for name, entry in entries
    ]
