"""Fairness: every task's figure by group of people, and the gaps between groups.

Groups are those that the source states (`gender`, `age_band`, `skin_tone`) and their pairwise intersections; fairlearn
takes the questions apart by them. Intervals are of the bootstrap over people that all figures share, so a gap is
between figures of the same resamples, and somebody who is in both groups counts once. Few people who are nearly all
right resample to nearly no error, so the error of a gap between shares is at least that of `stats.share_variance`. The
p values of all gaps of an evaluation, over tasks and kinds, are one family of Holm's. Groups of fewer people than
`evaluate.min_group` get no figure and enter no gap.
A group's balanced accuracy is over the classes that occur in it, as everywhere here; a gap is over those that occur in
both groups, else it would say that men have beards. Where groups are classes (gender by gender) they share none: then
the gap is that of their own recalls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from facemllm import tasks
from facemllm.scoring import metrics, stats
from facemllm.scoring.metrics import Array, Parsed, mean
from facemllm.scoring.sheet import BETWEEN, Rows, Sheet
from facemllm.scoring.summary import of_item
from facemllm.settings import Settings

LARGEST = ("a", "b", "value", "low", "high", "p_holm")


@dataclass(frozen=True)
class Group:
    """The questions of a task about one group: their positions, the people asked about, the unreadable share."""

    rows: Rows
    people: int
    unreadable: float


@dataclass(frozen=True)
class Cell:
    """The figure of a part of a group's questions, replicated, and the people it is over."""

    values: Array
    people: int


Groups = dict[str, dict[str, Group]]
"""By task and name of the group."""
Part = tuple[str, str]
"""Item, and true class ("" where the metric is not taken class by class)."""
Cells = Mapping[Part, Cell]


def measure(settings: Settings, sheet: Sheet, parsed: Parsed) -> dict[str, Any]:
    """Figures by task, kind and group, and the gaps between groups with enough people, as in `metrics.json`. A gap is
    `a` minus `b`; `error` is its standard error, `low` and `high` the t interval of its test, `p` is None where people
    do not differ at all. A kind with no known group is left out."""
    found: dict[str, Any] = {task: {} for task, _ in sheet.rows}
    for kind in sheet.kinds:
        for task, groups in disaggregate(sheet, parsed, kind).items():
            found[task][BETWEEN.join(kind)] = _of_kind(settings, sheet, parsed, task, groups)
    _correct([gap for kinds in found.values() for entry in kinds.values() for gap in entry["gaps"]])
    for entry in (entry for kinds in found.values() for entry in kinds.values()):
        largest = max(entry["gaps"], key=lambda gap: abs(gap["value"]), default=None)
        entry["largest"] = {name: largest[name] for name in LARGEST} if largest else None
    return found


def disaggregate(sheet: Sheet, parsed: Parsed, kind: Sequence[str]) -> Groups:
    """The answers taken apart by group of a kind (`("gender", "age_band")`: their intersections)."""
    import pandas as pd
    from fairlearn.metrics import MetricFrame

    names = pd.DataFrame({part: list(sheet.groups[part]) for part in kind})
    faces = np.flatnonzero(names.notna().all(axis=1))
    if not len(faces) or not sheet.rows:
        return {}
    frame = MetricFrame(
        metrics=lambda members, _: frozenset(members), y_true=faces, y_pred=faces, sensitive_features=names.iloc[faces]
    )
    found: Groups = {}
    for task in dict.fromkeys(task for task, _ in sheet.rows):
        asked, metric, groups = sheet.of_task(task), metrics.of(tasks.get(task)), found.setdefault(task, {})
        for name, members in frame.by_group.items():
            inside = np.isin(sheet.faces[asked], list(members) if isinstance(members, frozenset) else [])
            if inside.any():  # an intersection may be empty, or be asked nothing of this task
                rows = asked[inside]
                unreadable = sum(metric.is_unreadable(parsed[row]) for row in rows) / len(rows)
                own = Group(rows, len(np.unique(sheet.subjects[rows])), unreadable)
                groups[BETWEEN.join(name if isinstance(name, tuple) else (name,))] = own
    return found


def replicates(
    settings: Settings, sheet: Sheet, parsed: Parsed, task: str, groups: Mapping[str, Group]
) -> dict[str, Array]:
    """A task's figure of every group, on the sample and on the resamples of people shared by all."""
    drawn = _drawn(settings, sheet, parsed, task, groups)
    return {name: _macro(parts, parts) for name, parts in drawn.items()}


def _drawn(
    settings: Settings, sheet: Sheet, parsed: Parsed, task: str, groups: Mapping[str, Group]
) -> dict[str, dict[Part, Cell]]:
    """Replicates of every group by item, and by class where the metric is a mean over classes."""
    metric = metrics.of(tasks.get(task))
    by_class = metric.of_class is not None
    figures: dict[tuple[str, Part], stats.Sums] = {}
    people: dict[tuple[str, Part], int] = {}
    for name, group in groups.items():
        only = np.zeros(len(sheet.answers), dtype=bool)
        only[group.rows] = True
        for (owner, item), rows in sheet.rows.items():
            kept = rows[only[rows]] if owner == task else rows[:0]
            answers = np.asarray([sheet.answers[row] for row in kept], dtype=object)
            for label in np.unique(answers) if by_class else [""] * bool(len(kept)):
                some = kept[answers == label] if by_class else kept
                key = name, (item, str(label))
                people[key] = len(np.unique(sheet.subjects[some]))
                figures[key] = of_item(sheet, (task, item), some, parsed, metric.of_class or metric)
    found: dict[str, dict[Part, Cell]] = {name: {} for name in groups}
    for (name, part), values in stats.replicate(figures, settings.evaluate.bootstrap, settings.seed).items():
        found[name][part] = Cell(values, people[name, part])
    return found


def _macro(parts: Cells, kept: Iterable[Part]) -> Array:
    """Mean over items of the means over their classes, of the parts that are kept."""
    items: dict[str, list[Array]] = {}
    for item, label in kept:
        items.setdefault(item, []).append(parts[item, label].values)
    return mean(mean(classes) for classes in items.values())


def _least_variance(parts: Cells, kept: Sequence[Part]) -> float:
    """The least variance of `_macro` of shares: that of its parts, each with its weight."""
    classes = Counter(item for item, _ in kept)
    found = 0.0
    for item, label in kept:
        cell, weight = parts[item, label], 1 / (len(classes) * classes[item])
        share = float(cell.values[0])
        found += 0.0 if math.isnan(share) else weight**2 * stats.share_variance(share, cell.people)
    return found


def beyond(kinds: Mapping[str, Any], allowed: float) -> list[dict[str, Any]]:
    """The gaps of a task that are shown to exceed what is allowed, each with its `kind`, the surest first. Shown: the
    whole 95 % interval of the gap lies beyond `allowed`, corrected by Holm's method for all gaps of the task, whatever
    their kind; `p_holm` is that of this test."""
    found = []
    for kind, entry in kinds.items():
        people = {name: group["people"] for name, group in entry["groups"].items()}
        for gap in entry["gaps"]:
            error = float("nan") if gap["error"] is None else gap["error"]
            p = stats.p_value(gap["value"], error, min(people[gap["a"]], people[gap["b"]]), allowed)
            found.append({**gap, "kind": kind, "p": p})
    _correct(found)
    shown = [gap for gap in found if gap["p_holm"] is not None and gap["p_holm"] < stats.SHOWN]
    return sorted(shown, key=lambda gap: (gap["p_holm"], -abs(gap["value"])))


def _correct(gaps: Sequence[dict[str, Any]]) -> None:
    """Take the p values of gaps as one family: `p` as stored, and `p_holm`."""
    for gap, p in zip(gaps, stats.holm([gap["p"] for gap in gaps]), strict=True):
        gap |= {"p": stats.plain(gap["p"]), "p_holm": stats.plain(p)}


def _of_kind(
    settings: Settings, sheet: Sheet, parsed: Parsed, task: str, groups: Mapping[str, Group]
) -> dict[str, Any]:
    enough = {name: group for name, group in groups.items() if group.people >= settings.evaluate.min_group}
    drawn = _drawn(settings, sheet, parsed, task, enough)
    entries = {
        name: {
            **(stats.spread(_macro(drawn[name], drawn[name]), group.people) if name in enough else stats.NOTHING),
            "n": len(group.rows),
            "people": group.people,
            "unreadable": stats.plain(group.unreadable),
            "too_few": name not in enough,
        }
        for name, group in groups.items()
    }
    shares = not metrics.of(tasks.get(task)).in_unit
    found = [_gap(a, b, drawn, enough, shares=shares) for a, b in combinations(enough, 2)]
    return {"groups": entries, "gaps": [gap for gap in found if gap is not None]}


def _gap(
    a: str, b: str, drawn: Mapping[str, Cells], groups: Mapping[str, Group], *, shares: bool
) -> dict[str, Any] | None:
    """The gap of two groups on the classes of both; if they share none, each on its own. None when undefined."""
    both = [part for part in drawn[a] if part in drawn[b]]
    kept_a, kept_b = both or list(drawn[a]), both or list(drawn[b])
    people = min(groups[a].people, groups[b].people)
    difference = _macro(drawn[a], kept_a) - _macro(drawn[b], kept_b)
    value = float(difference[0])
    if stats.plain(value) is None:
        return None
    error = stats.standard_error(difference)
    if shares:
        error = max(error, math.sqrt(_least_variance(drawn[a], kept_a) + _least_variance(drawn[b], kept_b)))
    p = stats.p_value(value, error, people)
    return {"a": a, "b": b, **stats.t_interval(value, error, people), "error": stats.plain(error), "p": p}
