"""A comparison for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from facemllm.scoring.paired import BETTER, SAME, WORSE, by_group, by_task

_STYLES = {BETTER: "green", WORSE: "bold red", SAME: "dim"}
_MARKS = {BETTER: "▲ better", WORSE: "▼ worse", SAME: "· not shown"}


def shown(comparison: Mapping[str, Any]) -> Iterator[Table | Text]:
    """What to print, in order: tasks and items, then the groups of people in which a difference is shown."""
    first, second = (escape(name) for name in comparison["names"])
    table = _table(f"{second} (second) against {first} (first)")
    for task, item, entry in by_task(comparison["figures"]):
        head = "all closed questions" if task == "closed_mean" else task
        _add(table, f"  {item}" if item else head, entry)
    yield table
    groups = list(by_group(comparison["groups"]))
    told = [row for row in groups if row[3]["verdict"] != SAME]
    if told:
        table = _table("groups of people in which a difference is shown")
        for task, kind, name, entry in told:
            _add(table, f"{task}  {kind}: {name}", entry)
        yield table
    facts = (
        f"{comparison['n_images']:,} images of {comparison['n_subjects']:,} people, split {comparison['split']}. A "
        "difference is shown where p, corrected (Holm) for all tasks, or all items, or all groups of people, is below "
        "0.05. “Would show”: the smallest difference that is seen four times in five on these people."
    )
    if groups:
        facts += f" {len(groups) - len(told)} of {len(groups)} groups show none; all are in --html and --json."
    yield Text(facts, style="dim")


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False, box=None)
    table.add_column("")
    table.add_column("metric", style="cyan")
    for name in ("first", "second", "difference", "95 %", "p (Holm)", "would show"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def _add(table: Table, name: str, entry: Mapping[str, Any]) -> None:
    digits = 3 if entry["higher_is_better"] else 2
    change = entry["difference"]

    def show(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}.{digits}f}"

    verdict = entry["verdict"]
    table.add_row(
        escape(name),
        escape(f"{entry['metric']} ({entry['unit']})" if entry["unit"] else entry["metric"]),
        show(entry["first"]),
        show(entry["second"]),
        show(change["value"], "+"),
        f"{show(change['low'], '+')} {show(change['high'], '+')}",
        "–" if entry["p_holm"] is None else f"{entry['p_holm']:.3f}",
        show(entry["smallest_difference"]),
        Text(_MARKS[verdict], style=_STYLES[verdict]),
    )
