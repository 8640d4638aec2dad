"""Small charts as inline SVG, coloured by the style sheet's variables so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 200, 26
CURVE_WIDTH, CURVE_HEIGHT = 340, 170
_POINTS = 240  # more than this no eye tells apart at this width


def interval_bar(figure: Mapping[str, Any]) -> str:
    """A figure on its scale: the 95 % interval as a bar, the value in it, majority and pixels as marks.

    Shares run from 0 to 1, errors from 0 to a little beyond the worst of the figures shown.
    """
    marks = {name: figure["baselines"].get(name) for name in ("majority", "pixels")}
    shown = [v for v in (figure["value"], figure["low"], figure["high"], *marks.values()) if v is not None]
    top = 1.0 if figure["higher_is_better"] else max(shown, default=0.0) * 1.06 or 1.0
    return bar(figure, top, marks)


def bar(figure: Mapping[str, Any], top: float, marks: Mapping[str, float | None] | None = None) -> str:
    """A value with its interval on a scale from 0 to `top`; `majority` and `pixels` as marks where given."""
    if figure.get("value") is None:
        return '<span class="quiet">no figure</span>'
    drawn = {name: value for name, value in (marks or {}).items() if value is not None}

    def x(value: float) -> str:
        return f"{6 + (WIDTH - 12) * min(max(value / top, 0.0), 1.0):.1f}"

    middle = HEIGHT / 2
    parts = [f'<line class="axis" x1="{x(0)}" y1="{middle}" x2="{x(top)}" y2="{middle}"/>']
    if figure.get("low") is not None and figure.get("high") is not None:
        width = max(float(x(figure["high"])) - float(x(figure["low"])), 2.0)
        parts.append(
            f'<rect class="interval" x="{x(figure["low"])}" y="{middle - 6}" width="{width:.1f}" height="12" rx="3"/>'
        )
    if "majority" in drawn:
        left = x(drawn["majority"])
        parts.append(f'<line class="majority" x1="{left}" y1="2" x2="{left}" y2="{HEIGHT - 2}"/>')
    if "pixels" in drawn:
        at = float(x(drawn["pixels"]))
        parts.append(f'<path class="pixels" d="M{at} {middle - 6} l6 6 -6 6 -6 -6z"/>')
    parts.append(f'<circle class="value" cx="{x(figure["value"])}" cy="{middle}" r="3.5"/>')
    words = "".join(f"; {name} {value:.3g}" for name, value in drawn.items())
    label = escape(f"{figure['value']:.3g} on a scale from 0 to {top:.3g}{words}")
    return f'<svg class="bar" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def change_bar(change: Mapping[str, Any], reach: float) -> str:
    """A difference with its interval on a scale from `-reach` to `reach`, zero marked in the middle."""
    if change.get("value") is None or reach <= 0:
        return '<span class="quiet">no figure</span>'
    moved = {end: change[end] + reach for end in ("value", "low", "high") if change.get(end) is not None}
    return bar(moved, 2 * reach, {"majority": reach})


def reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """Share of right answers against confidence, one point a bin, larger where there are more answers."""
    filled = [b for b in bins if b.get("n")]
    if not filled:
        return '<p class="quiet">no answers with probabilities</p>'
    most = max(b["n"] for b in filled)

    def x(value: float) -> float:
        return 30 + 200 * value

    def y(value: float) -> float:
        return 210 - 200 * value

    axes = f'<path class="axis" fill="none" d="M{x(0)} {y(1)} V{y(0)} H{x(1)}"/>'
    diagonal = f'<line class="grid" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>'
    points = "".join(
        f'<circle class="value" cx="{x(b["confidence"]):.1f}" cy="{y(b["accuracy"]):.1f}" '
        f'r="{2 + 5 * math.sqrt(b["n"] / most):.1f}"/>'
        for b in filled
    )
    ends = "".join(
        f'<text x="{x(v):.0f}" y="226" text-anchor="middle">{v:g}</text>'
        f'<text x="24" y="{y(v) + 4:.0f}" text-anchor="end">{v:g}</text>'
        for v in (0, 0.5, 1)
    )
    label = escape("; ".join(f"{b['confidence']:.2f}: {b['accuracy']:.2f} of {b['n']}" for b in filled))
    body = axes + diagonal + points + ends
    return f'<svg class="reliability" viewBox="0 0 250 232" role="img" aria-label="{label}">{body}</svg>'


def curve(points: Sequence[Mapping[str, Any]], name: str = "loss") -> str:
    """A training curve over steps: every logged value faint, a running mean over it."""
    steps, values = [], []
    for point in points:
        step, value = point.get("step"), point.get(name)
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value):
            steps.append(float(step))
            values.append(float(value))
    if len(values) < 2:
        return '<p class="quiet">too few points for a curve</p>'
    left, bottom, top = 44, CURVE_HEIGHT - 22, 10
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    # one wild value must not flatten the rest: the scale ends at the 99th percentile
    low, high = min(values), sorted(values)[math.ceil(0.99 * len(values)) - 1]
    high = high if high > low else low + 1

    def path(series: Sequence[float]) -> str:
        thin = max(1, len(series) // _POINTS)
        places = [*range(0, len(series) - 1, thin), len(series) - 1]
        return " ".join(f"{x(steps[i]):.1f},{y(series[i]):.1f}" for i in places)

    def x(step: float) -> float:
        return left + (CURVE_WIDTH - left - 8) * (step - first) / (last - first)

    def y(value: float) -> float:
        return top + (bottom - top) * (1 - (min(value, high) - low) / (high - low))

    grid = [
        f'<line class="grid" x1="{left}" y1="{y(v):.1f}" x2="{CURVE_WIDTH - 8}" y2="{y(v):.1f}"/>'
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>'
        for v in (low, (low + high) / 2, high)
    ]
    ends = "".join(
        f'<text x="{x(step):.1f}" y="{CURVE_HEIGHT - 6}" text-anchor="{anchor}">{step:g}</text>'
        for step, anchor in ((first, "start"), (last, "end"))
    )
    label = escape(f"{name} from {values[0]:.3g} to {values[-1]:.3g} over {len(values)} points")
    return (
        f'<svg class="curve" viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" role="img" aria-label="{label}">{"".join(grid)}'
        f'<polyline class="raw" points="{path(values)}"/><polyline class="smooth" points="{path(_smooth(values))}"/>'
        f"{ends}</svg>"
    )


def _smooth(values: Sequence[float]) -> list[float]:
    window = max(1, len(values) // 25)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    found = []
    for index in range(len(values)):
        start = max(0, index - window)
        end = min(len(values), index + window + 1)
        found.append((sums[end] - sums[start]) / (end - start))
    return found
