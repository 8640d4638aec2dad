"""A comparison as one HTML file: no network, no scripts, everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from facemllm.core.files import atomic_write
from facemllm.report import html
from facemllm.report.charts import change_bar
from facemllm.report.results import words_of
from facemllm.scoring.paired import BETTER, SAME, WORSE, by_group, by_task, by_verdict

_HEAD = ("", "metric", "first", "second", "difference [95 %]", "lower ← 0 → higher", "p (Holm)", "would show", "")
_NUMERIC = (2, 3, 6, 7)
_TAGS = {BETTER: ("▲ better", "good"), WORSE: ("▼ worse", "bad"), SAME: ("· not shown", "quiet")}
_NOTE = (
    "Both answered the same questions about the same people, so differences are over pairs; intervals are a bootstrap "
    "over people. A difference counts as shown when p is below 5 %, corrected (Holm) for all tasks, or all items, or "
    "all groups of people; on fewer people than a group needs for a figure none is shown. "
    "“Would show”: the smallest difference that this test set shows four times in five. That no difference is shown "
    "does not mean that there is none."
)


def write_page(out: Path, comparison: Mapping[str, Any]) -> None:
    """Write a comparison (`compare.compare`) as a page; whole or not at all."""
    first, second = comparison["names"]
    sections = [_header(comparison), _verdicts(comparison), _tasks(comparison), _groups(comparison["groups"])]
    atomic_write(out, html.page(f"{second} against {first}", sections))


def _header(comparison: Mapping[str, Any]) -> str:
    first, second = (html.text(name) for name in comparison["names"])
    facts = (
        f"split {html.text(comparison['split'])} · {html.text(comparison['n_images'])} images of "
        f"{html.text(comparison['n_subjects'])} people"
    )
    return (
        f'<header><h1>{second} <span class="quiet">against</span> {first}</h1><p class="quiet">{facts}</p>'
        f'<p class="quiet">first: {first}, model {html.code(comparison["first"][:12])} · second: {second}, model '
        f"{html.code(comparison['second'][:12])}</p></header>"
    )


def _verdicts(comparison: Mapping[str, Any]) -> str:
    rows = [
        html.row([html.tag(verdict, _TAGS[verdict][1]), ", ".join(html.words(name) for name in names)])
        for verdict, names in by_verdict(comparison).items()
        if names
    ]
    return html.section("The second run, by task", html.table(("", "tasks"), rows) + html.quiet(_NOTE))


def _tasks(comparison: Mapping[str, Any]) -> str:
    found = list(by_task(comparison["figures"]))
    heads = [
        ("all closed questions" if task == "closed_mean" else task, entry) for task, item, entry in found if not item
    ]
    parts = [_table(heads)]
    for task in dict.fromkeys(task for task, item, _ in found if item):
        items = [(item, entry) for name, item, entry in found if item and name == task]
        parts.append(html.folded(f"{task.replace('_', ' ')}: {len(items)} items", _table(items)))
    return html.section("Tasks and items", "".join(parts))


def _groups(groups: Mapping[str, Any]) -> str:
    found = list(by_group(groups))
    if not found:
        return ""
    told = [(f"{task}, {kind}: {name}", entry) for task, kind, name, entry in found if entry["verdict"] != SAME]
    lead = _table(told) if told else "<p>In no group of people is a difference shown.</p>"
    folds = [
        html.folded(
            f"{task.replace('_', ' ')}: every group",
            _table((f"{kind}: {name}", entry) for owner, kind, name, entry in found if owner == task),
        )
        for task in dict.fromkeys(row[0] for row in found)
    ]
    return html.section("Groups of people", lead + "".join(folds))


def _table(entries: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Rows on one scale a metric and unit, so that bars beneath each other compare."""
    kept = list(entries)
    reach: dict[str, float] = {}
    for _, entry in kept:
        ends = [abs(entry["difference"][end] or 0.0) for end in ("value", "low", "high")]
        reach[entry["unit"]] = max(reach.get(entry["unit"], 0.0), *ends)
    rows = [_row(name, entry, reach[entry["unit"]] * 1.05) for name, entry in kept]
    return html.table(_HEAD, rows, numeric=_NUMERIC, kind="results")


def _row(name: str, entry: Mapping[str, Any], reach: float) -> str:
    digits = 3 if entry["higher_is_better"] else 2
    metric = words_of(entry["metric"]) + (f", {html.text(entry['unit'])}" if entry["unit"] else "")
    cells = [
        html.words(name),
        f"<small>{metric} {'↑' if entry['higher_is_better'] else '↓'}</small>",
        html.number(entry["first"], digits),
        html.number(entry["second"], digits),
        html.estimate(entry["difference"], digits),
        change_bar(entry["difference"], reach),
        html.number(entry["p_holm"]),
        html.number(entry["smallest_difference"], digits),
        html.tag(*_TAGS[entry["verdict"]]),
    ]
    return html.row(cells, numeric=_NUMERIC)
