"""Groups of people side by side: figures with intervals, and the gaps between groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from facemllm.report import figures, html
from facemllm.report.charts import bar

_LEAD = (
    "Figures by groups of people, as the sources label them. Where a figure is a mean over classes, a gap is over the "
    "classes that both groups have, so it may differ from the difference of their figures. A gap counts as shown when "
    "its p value, corrected for all pairs of groups of all tasks together (Holm), is below 5 %. That none is shown "
    "does not mean that there is none: see the width of the intervals."
)


def fairness(metrics: Mapping[str, Any]) -> str:
    """The gaps that are shown; folded beneath them, by task, the largest gap of each kind, every group, every pair."""
    found = metrics.get("fairness") or {}
    if not any(found.values()):
        return ""
    errors = {task: not (metrics.get("tasks") or {}).get(task, {}).get("higher_is_better", True) for task in found}
    folds = [
        html.folded(f"{task.replace('_', ' ')}: every group", _task(kinds, errors[task]))
        for task, kinds in found.items()
    ]
    return html.section("Fairness", html.quiet(_LEAD) + _shown(metrics, errors) + "".join(folds))


def _shown(metrics: Mapping[str, Any], errors: Mapping[str, bool]) -> str:
    gaps = figures.trust(metrics)["gaps"]
    if not gaps["compared"]:
        return "<p>No two groups have enough people to be compared.</p>"
    if not gaps["shown"]:
        return f"<p>A gap is shown in none of {gaps['compared']} comparisons (a task by a kind of group).</p>"
    lead = f"<p>A gap is shown in {gaps['shown']} of {gaps['compared']} comparisons (a task by a kind of group).</p>"
    rows = [
        html.row([html.words(gap["task"]), html.words(gap["kind"]), *_gap(gap, errors[gap["task"]])], numeric=(4,))
        for gap in figures.shown_gaps(metrics)
    ]
    return lead + html.table(("task", "groups by", "largest gap shown [95 %]", "between", "p (Holm)"), rows, (4,))


def _task(kinds: Mapping[str, Any], errors: bool) -> str:
    rows = []
    for kind, body in kinds.items():
        groups = (body.get("groups") or {}).values()
        few = sum(bool(group.get("too_few")) for group in groups)
        why = f"too few people for a figure in {few} of {len(groups)} groups" if few else "nothing to compare"
        gap = body.get("largest")
        cells = _gap(gap, errors) if gap else [f'<span class="quiet">{why}</span>', "", ""]
        rows.append(html.row([html.words(kind), *cells], numeric=(3,)))
    head = ("groups by", "largest gap [95 %]", "between", "p (Holm)")
    return html.table(head, rows, numeric=(3,)) + "".join(_groups(kind, body, errors) for kind, body in kinds.items())


def _gap(gap: Mapping[str, Any], errors: bool) -> list[str]:
    between = f"{html.words(str(gap['a']))} – {html.words(str(gap['b']))}"
    return [html.estimate(gap, 2 if errors else 3), between, _p(gap.get("p_holm"))]


def _groups(kind: str, body: Mapping[str, Any], errors: bool) -> str:
    groups, digits = body.get("groups") or {}, 2 if errors else 3
    ends = [group[end] for group in groups.values() for end in ("value", "high") if group.get(end) is not None]
    top = max(ends, default=1.0) * 1.06 if errors else 1.0
    rows = []
    for name, group in groups.items():
        counts = [html.text(group.get("people")), html.text(group.get("n")), html.percent(group.get("unparsed"))]
        if group.get("too_few") or group.get("value") is None:
            shown = ['<span class="quiet">too few people for a figure</span>', ""]
        else:
            shown = [html.estimate(group, digits), bar(group, top)]
        rows.append(html.row([html.words(name), *shown, *counts], numeric=(3, 4, 5)))
    head = (kind.replace("_", " "), "figure [95 %]", "", "people", "asked", "unread")
    return html.table(head, rows, numeric=(3, 4, 5)) + _pairs(body.get("gaps") or (), digits)


def _pairs(gaps: Sequence[Mapping[str, Any]], digits: int) -> str:
    if len(gaps) < 2:
        return ""
    ordered = sorted(gaps, key=lambda gap: -abs(gap.get("value") or 0.0))
    rows = [
        html.row(
            [
                f"{html.words(str(gap['a']))} – {html.words(str(gap['b']))}",
                html.estimate(gap, digits),
                _p(gap.get("p")),
                _p(gap.get("p_holm")),
            ],
            numeric=(2, 3),
        )
        for gap in ordered
    ]
    return html.folded(f"all {len(rows)} pairs", html.table(("pair", "gap [95 %]", "p", "p (Holm)"), rows, (2, 3)))


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
