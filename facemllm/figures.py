"""An evaluation as MLflow shows it: metric names, a results table, some answers to look at, a figure of intervals.

Pure functions of `metrics.json` (or of the `tasks` of a summary) and of the predictions table. Metric names are stable,
so that runs compare:

    <task>/value  <task>/low  <task>/high           figure and its 95 % interval; also <task>/n and <task>/unparsed
    <task>/baseline_majority  <task>/baseline_...   what needs no model, or a small one
    <task>/<item>/value ...                         the same for an item of a task: head_pose/yaw, attributes/Smiling
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("value", "low", "high", "n", "unparsed")
HEAD = ("task", "item", "metric", "unit")
ANSWERS = ("task", "question", "answer", "parsed", "raw", "sample_id", "image_id")


def task_metrics(tasks: Mapping[str, Any], prefix: str = "", *, items: bool = True) -> dict[str, float]:
    """Figures of tasks under their stable metric names; `items=False` leaves out the items of tasks."""
    flat: dict[str, float] = {}
    for name, figures in tasks.items():
        base = f"{prefix}{name}"
        flat |= numbers({field: figures.get(field) for field in FIGURES}, f"{base}/")
        flat |= numbers(baselines(figures), f"{base}/baseline_")
        if items:
            flat |= task_metrics(figures.get("items") or {}, f"{base}/")
    return flat


def baselines(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Value of each baseline of a task or item, whether it is stored as a number or with its interval."""
    stored = figures.get("baselines") or {}
    return {name: b.get("value") if isinstance(b, Mapping) else b for name, b in stored.items()}


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested mapping, by names joined with `/`; everything else is left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, as text: strings as they are, anything else as JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def results(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a task and one an item of a task: figure, interval, counts, baselines. What a table needs."""
    rows = []
    for task, figures in tasks.items():
        for item, part in [("", figures), *(figures.get("items") or {}).items()]:
            kind = {name: part.get(name) or figures.get(name) or "" for name in ("metric", "unit")}
            row = {"task": task, "item": item, **kind}
            rows.append(row | {field: part.get(field) for field in FIGURES} | baselines(part))
    return rows


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns; a value that a row lacks is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def sample_answers(predictions: Iterable[Mapping[str, Any]], per_task: int = 60) -> list[dict[str, Any]]:
    """Some answers of every task: those with the smallest sample ids, which are digests, so a fair and stable draw."""
    kept: dict[str, list[Mapping[str, Any]]] = {}
    for row in predictions:
        rows = kept.setdefault(row["task"], [])
        rows.append(row)
        if len(rows) >= 8 * per_task:
            kept[row["task"]] = sorted(rows, key=lambda r: r["sample_id"])[:per_task]
    return [
        {name: row[name] for name in ANSWERS}
        for task in sorted(kept)
        for row in sorted(kept[task], key=lambda r: r["sample_id"])[:per_task]
    ]


def intervals(tasks: Mapping[str, Any]) -> Figure:
    """Every task and item with its 95 % interval beside its baselines, one panel a metric and unit."""
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in results(tasks):
        if row["value"] is not None:
            panels.setdefault(f"{row['metric']} {row['unit']}".strip(), []).append(row)
    heights = [len(rows) + 1.5 for rows in panels.values()] or [1.0]
    figure = Figure(figsize=(8, 0.6 + 0.32 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    known = {*HEAD, *FIGURES}
    names = dict.fromkeys(name for rows in panels.values() for row in rows for name in row if name not in known)
    for axis, (metric, rows) in zip(axes, panels.items(), strict=False):
        for y, row in enumerate(rows):
            if row["low"] is not None and row["high"] is not None:
                axis.plot([row["low"], row["high"]], [y, y], color="C0", linewidth=2)
        axis.scatter([r["value"] for r in rows], range(len(rows)), color="C0", zorder=3, label="model, 95 % interval")
        for index, name in enumerate(names):
            points = [(row[name], y) for y, row in enumerate(rows) if row.get(name) is not None]
            axis.scatter(
                *zip(*points, strict=True) if points else ([], []), marker="|", s=90, c=f"C{index + 1}", label=name
            )
        labels = [f"{row['task']}  {row['item']}" if row["item"] else row["task"] for row in rows]
        axis.set_yticks(range(len(rows)), labels)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel(metric)
        axis.grid(axis="x", alpha=0.3)
    if panels:
        axes[0].legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return figure
