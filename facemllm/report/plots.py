"""The figures of an evaluation and of training, as matplotlib draws them: MLflow keeps them beside the numbers, pages
show them as SVG.

evaluation/intervals          every task and item with its 95 % interval beside its baselines
evaluation/fairness           groups of people with their intervals, one panel a task
evaluation/reliability        how often answers are right against how sure they are
evaluation/confusion/<item>   what was answered (columns) against the truth (rows)
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from facemllm.scoring import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[Mapping[str, Any]]
"""What a training stage logged: a dictionary a logged step."""

_PLAIN = {*figures.HEAD, *figures.FIGURES}
_INK = "#808890"  # grey that can be read on white and on black
_LINE = "#3d8bc9"
_POINTS = 240  # more than this no eye tells apart at this width


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
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in figures.results(tasks):
        if row["value"] is not None:
            panels.setdefault(f"{row['metric']} {row['unit']}".strip(), []).append(row)
    figure, axes = _stacked([len(rows) + 1.5 for rows in panels.values()] or [1.0], 0.32)
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
        _label(axis, [f"{row['task']}  {row['item']}" if row["item"] else row["task"] for row in rows])
        axis.set_xlabel(metric)
    if panels:
        axes[0].legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return figure


def fairness(metrics: Mapping[str, Any]) -> Figure:
    """Groups of people with their 95 % intervals, one panel a task; groups too small for a figure are left out."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in _group_rows(metrics):
        if row.get("value") is not None:
            panels.setdefault(row["task"], []).append(row)
    figure, axes = _stacked([len(rows) + 1.5 for rows in panels.values()], 0.3)
    for axis, (task, rows) in zip(axes, panels.items(), strict=True):
        kinds = list(dict.fromkeys(row["kind"] for row in rows))
        for y, row in enumerate(rows):
            color = f"C{kinds.index(row['kind'])}"
            if row.get("low") is not None and row.get("high") is not None:
                axis.plot([row["low"], row["high"]], [y, y], color=color, linewidth=2)
            axis.scatter([row["value"]], [y], color=color, zorder=3)
        _label(axis, [f"{row['kind']}  {row['group']}  ({row.get('people')})" for row in rows])
        axis.set_title(_plain(task), fontsize="medium", loc="left")
    return figure


def _stacked(heights: Sequence[float], inches: float) -> tuple[Figure, Any]:
    """Panels beneath each other, and their figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + inches * sum(heights)), layout="constrained")
    return figure, figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]


def _label(axis: Any, rows: Sequence[str]) -> None:
    axis.set_yticks(range(len(rows)), [*map(_plain, rows)])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def _group_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in figures.fairness_rows(metrics) if " x " not in row["kind"]]


def reliability(calibration: Mapping[str, Any]) -> Figure:
    """Share of right answers against stated confidence, a panel a task, larger points for more answers; the diagonal is
    a model that knows itself."""
    shown = {task: bins for task, body in calibration.items() if (bins := filled(body))}
    figure, axes = _grid(len(shown), 2.8, 2.7)
    for axis, (task, bins) in zip(axes, shown.items(), strict=False):
        most = max(b["n"] for b in bins)
        axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
        axis.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=_LINE, linewidth=1, alpha=0.6)
        sizes = [4 + 60 * b["n"] / most for b in bins]
        axis.scatter([b["confidence"] for b in bins], [b["accuracy"] for b in bins], s=sizes, color=_LINE, zorder=3)
        error = calibration[task].get("ece")
        ece = "" if error is None else f", ECE {error:.3f}"
        axis.set_title(f"{_plain(task.replace('_', ' '))}{ece}", fontsize="small")
        axis.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.tick_params(labelsize="small")
        axis.grid(alpha=0.3)
    figure.supxlabel("confidence", fontsize="small")
    figure.supylabel("share right", fontsize="small")
    return figure


def filled(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The bins of a calibration that any answer fell into."""
    return [one for one in body.get("bins") or () if one.get("n")]


def confusion(name: str, body: Mapping[str, Any]) -> Figure:
    """Counts of answers by truth (rows) and answer (columns, the last one: unreadable), shaded by share of a row."""
    from matplotlib.figure import Figure

    labels = [_plain(str(label)) for label in body["labels"]]
    unreadable = body.get("unreadable") or [0] * len(labels)
    counts = [[*row, lost] for row, lost in zip(body["counts"], unreadable, strict=True)]
    side = 1.8 + 0.55 * len(labels)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow([[n / max(sum(row), 1) for n in row] for row in counts], cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(counts):
        for x, n in enumerate(row):
            ink = "white" if n > 0.6 * max(sum(row), 1) else "black"
            axis.text(x, y, str(n), ha="center", va="center", fontsize="small", color=ink)
    axis.set_xticks(range(len(labels) + 1), [*labels, "unreadable"], rotation=60, ha="right")
    axis.set_yticks(range(len(labels)), labels)
    axis.set(xlabel="answered", ylabel="truth", title=_plain(name))
    return figure


def curve(points: Points, names: Mapping[str, str]) -> Figure | None:
    """Training metrics over steps, a panel a metric (`names` says what they are called): every logged value faint, a
    running mean over it. One wild value does not flatten the rest: a scale ends at the 99th percentile. None if no
    metric has two values."""
    found = {name: _series(points, name) for name in names}
    shown = {name: series for name, series in found.items() if len(series) > 1}
    if not shown:
        return None
    figure, axes = _grid(len(shown), 3.6, 2.0)
    for axis, (name, series) in zip(axes, shown.items(), strict=False):
        thin = [*range(0, len(series) - 1, max(1, len(series) // _POINTS)), len(series) - 1]
        steps, values = [step for step, _ in series], [value for _, value in series]
        smooth = _smooth(values)
        axis.plot([steps[i] for i in thin], [values[i] for i in thin], color=_LINE, linewidth=0.8, alpha=0.35)
        axis.plot([steps[i] for i in thin], [smooth[i] for i in thin], color=_LINE, linewidth=1.6)
        low, high = min(values), sorted(values)[math.ceil(0.99 * len(values)) - 1]
        reach = 0.05 * ((high - low) or 1)
        axis.set_ylim(low - reach, max(high, low) + reach)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize="small")
        if names[name]:
            axis.set_title(_plain(names[name]), fontsize="small")
    return figure


def _grid(panels: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """Panels of so many inches, three a row, and their figure; places that are left over stay empty."""
    from matplotlib.figure import Figure

    columns = min(max(panels, 1), 3)
    rows = -(-max(panels, 1) // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes


def curve_in_words(points: Points, name: str = "loss") -> str:
    """A training curve for who cannot see it."""
    series = _series(points, name)
    if not series:
        return f"{name}: no points"
    return f"{name} from {series[0][1]:.3g} to {series[-1][1]:.3g} over {len(series)} points"


def svg(figure: Figure) -> bytes:
    """A figure for a page, the same bytes for the same figure: no ground of its own, and ink that can be read on light
    and on dark."""
    import matplotlib

    for axis in figure.axes:
        axis.set_facecolor("none")
        axis.tick_params(colors=_INK)
        for part in (axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts):
            part.set_color(_INK)
        for name, spine in axis.spines.items():
            spine.set_color(_INK)
            spine.set_visible(name in ("left", "bottom"))
    for part in figure.texts:
        part.set_color(_INK)
    made = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "facemllm"}):
        figure.savefig(made, format="svg", transparent=True, metadata={"Date": None})
    return made.getvalue()


def _plain(name: str) -> str:
    """A name that matplotlib draws as it is: what stands between two dollars would be read as mathematics."""
    return name.replace("$", r"\$")


def _series(points: Points, name: str) -> list[tuple[float, float]]:
    pairs = [(point.get("step"), point.get(name)) for point in points]
    return [
        (float(step), float(value))
        for step, value in pairs
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value)
    ]


def _smooth(values: Sequence[float]) -> list[float]:
    """Running means over a twelfth of the values, fewer at the ends."""
    window = max(1, len(values) // 25)
    sums = [0.0, *itertools.accumulate(values)]
    ends = [(max(0, i - window), min(len(values), i + window + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]
