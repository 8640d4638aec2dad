"""The figures of an evaluation, as matplotlib draws them: MLflow keeps them beside the numbers.

evaluation/intervals          every task and item with its 95 % interval beside its baselines
evaluation/fairness           groups of people with their intervals, one panel a task
evaluation/reliability        how often answers are right against how sure they are
evaluation/confusion/<item>   what was answered (columns) against the truth (rows)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from facemllm.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLAIN = {*figures.HEAD, *figures.FIGURES}


def drawn(metrics: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure that the metrics of an evaluation allow, by name."""
    found = {"intervals": intervals(metrics.get("tasks") or {})}
    if any(row.get("value") is not None for row in _group_rows(metrics)):
        found["fairness"] = fairness(metrics)
    if metrics.get("calibration"):
        found["reliability"] = reliability(metrics["calibration"])
    for name, body in (metrics.get("confusion") or {}).items():
        found[f"confusion/{name}"] = confusion(name, body)
    return found


def intervals(tasks: Mapping[str, Any]) -> Figure:
    """Every task and item with its 95 % interval beside its baselines, one panel a metric and unit."""
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in figures.results(tasks):
        if row["value"] is not None:
            panels.setdefault(f"{row['metric']} {row['unit']}".strip(), []).append(row)
    heights = [len(rows) + 1.5 for rows in panels.values()] or [1.0]
    figure = Figure(figsize=(8, 0.6 + 0.32 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    names = dict.fromkeys(name for rows in panels.values() for row in rows for name in row if name not in _PLAIN)
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


def fairness(metrics: Mapping[str, Any]) -> Figure:
    """Groups of people with their 95 % intervals, one panel a task; groups too small for a figure are left out."""
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in _group_rows(metrics):
        if row.get("value") is not None:
            panels.setdefault(row["task"], []).append(row)
    heights = [len(rows) + 1.5 for rows in panels.values()]
    figure = Figure(figsize=(8, 0.6 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (task, rows) in zip(axes, panels.items(), strict=True):
        kinds = list(dict.fromkeys(row["kind"] for row in rows))
        for y, row in enumerate(rows):
            color = f"C{kinds.index(row['kind'])}"
            if row.get("low") is not None and row.get("high") is not None:
                axis.plot([row["low"], row["high"]], [y, y], color=color, linewidth=2)
            axis.scatter([row["value"]], [y], color=color, zorder=3)
        axis.set_yticks(range(len(rows)), [f"{row['kind']}  {row['group']}  ({row.get('people')})" for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(task, fontsize="medium", loc="left")
        axis.grid(axis="x", alpha=0.3)
    return figure


def _group_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in figures.fairness_rows(metrics) if " x " not in row["kind"]]


def reliability(calibration: Mapping[str, Any]) -> Figure:
    """Share of right answers against stated confidence, one line a task; the diagonal is a model that knows itself."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
    for task, body in calibration.items():
        bins = [b for b in body.get("bins") or () if b.get("n")]
        ece = "" if body.get("ece") is None else f", ECE {body['ece']:.3f}"
        axis.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], marker="o", label=f"{task}{ece}")
    axis.set(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)
    if calibration:
        axis.legend(fontsize="small", frameon=False)
    return figure


def confusion(name: str, body: Mapping[str, Any]) -> Figure:
    """Counts of answers by truth (rows) and answer (columns, the last one: not readable), shaded by share of a row."""
    from matplotlib.figure import Figure

    labels, unread = list(body["labels"]), body.get("unparsed") or [0] * len(body["labels"])
    counts = [[*row, lost] for row, lost in zip(body["counts"], unread, strict=True)]
    side = 1.8 + 0.55 * len(labels)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow([[n / max(sum(row), 1) for n in row] for row in counts], cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(counts):
        for x, n in enumerate(row):
            ink = "white" if n > 0.6 * max(sum(row), 1) else "black"
            axis.text(x, y, str(n), ha="center", va="center", fontsize="small", color=ink)
    axis.set_xticks(range(len(labels) + 1), [*labels, "not readable"], rotation=60, ha="right")
    axis.set_yticks(range(len(labels)), labels)
    axis.set(xlabel="answered", ylabel="truth", title=name)
    return figure
