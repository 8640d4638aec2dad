"""Fairness: every task's figure by group of people, and the gaps between groups.

Groups are those that the source states (`gender`, `age_band`, `skin_tone`) and their pairwise intersections; fairlearn
takes the questions apart by them. Figures have intervals of the bootstrap over people that all figures share; a gap has
the p value, the interval and the power of `gaps`, where somebody who is in both groups counts once. The p values of all
gaps of an evaluation, over tasks and kinds, are one family of Holm's; two groups of which most answers cannot be read
are not compared. Groups of fewer people than `evaluate.min_group` get no figure and enter no gap.
A group's balanced accuracy is over the classes that occur in it, as everywhere here; a gap is over those that occur in
both groups, else it would say that men have beards. Where groups are classes (gender by gender) they share none: then
the gap is that of their own recalls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from facemllm import tasks
from facemllm.scoring import gaps, metrics, stats
from facemllm.scoring.metrics import Array, Parsed, mean
from facemllm.scoring.sheet import BETWEEN, Rows, Sheet
from facemllm.scoring.summary import of_item
from facemllm.settings import Settings

LARGEST = ("a", "b", "value", "low", "high", "p_holm", "minimum_detectable_difference")


@dataclass(frozen=True)
class Group:
    """The questions of a task about one group: their positions, the people asked about, the unreadable share."""

    rows: Rows
    people: int
    unreadable: float


Groups = dict[str, dict[str, Group]]
"""By task and name of the group."""
Part = tuple[str, str]
"""Item, and true class ("" where the metric is not taken class by class)."""
Sums = Mapping[Part, stats.Sums]


def measure(settings: Settings, sheet: Sheet, parsed: Parsed) -> dict[str, Any]:
    """Figures by task, kind and group, and the gaps between groups with enough people, as in `metrics.json`. A gap is
    `a` minus `b`; `error`, `own_error`, `degrees` and `growth` are those of `gaps.Gap`, `low` and `high` the t interval
    of its test, `minimum_detectable_difference` that at the level that the surest gap of the evaluation has
    to reach; `p` is None where people do not differ at all. A kind with no known group is left out."""
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
    summed = _summed(sheet, parsed, task, groups)
    return {name: _macro(parts) for name, parts in _replicated(settings, summed).items()}


def _summed(sheet: Sheet, parsed: Parsed, task: str, groups: Mapping[str, Group]) -> dict[str, dict[Part, stats.Sums]]:
    """Sums of every group by item, and by class where the metric is a mean over classes."""
    metric = metrics.of(tasks.get(task))
    by_class = metric.of_class is not None
    found: dict[str, dict[Part, stats.Sums]] = {name: {} for name in groups}
    for name, group in groups.items():
        only = np.zeros(len(sheet.answers), dtype=bool)
        only[group.rows] = True
        for (owner, item), rows in sheet.rows.items():
            kept = rows[only[rows]] if owner == task else rows[:0]
            answers = np.asarray([sheet.answers[row] for row in kept], dtype=object)
            for label in np.unique(answers) if by_class else [""] * bool(len(kept)):
                some = kept[answers == label] if by_class else kept
                found[name][item, str(label)] = of_item(sheet, (task, item), some, parsed, metric.of_class or metric)
    return found


def _replicated(settings: Settings, summed: Mapping[str, Sums]) -> dict[str, dict[Part, Array]]:
    figures = {(name, part): sums for name, parts in summed.items() for part, sums in parts.items()}
    found: dict[str, dict[Part, Array]] = {name: {} for name in summed}
    for (name, part), values in stats.replicate(figures, settings.evaluate.bootstrap, settings.seed).items():
        found[name][part] = values
    return found


def _macro(parts: Mapping[Part, Array]) -> Array:
    """Mean over items of the means over their classes."""
    items: dict[str, list[Array]] = {}
    for (item, _), values in parts.items():
        items.setdefault(item, []).append(values)
    return mean(mean(classes) for classes in items.values())


def judged(kinds: Mapping[str, Any], allowed: float) -> list[dict[str, Any]]:
    """The gaps of a task, each with its `kind`, held against what is allowed: `p` and `p_holm` are of the test that the
    gap in truth exceeds `allowed`, corrected by Holm's method for all gaps of the task, whatever their kind; so is the
    level of `minimum_detectable_difference`. `minimum_refused_gap` is the gap that this test shows to exceed `allowed`
    four times in five, None where that is unknown."""
    found = []
    for kind, entry in kinds.items():
        for gap in entry["gaps"]:
            size = abs(gap["value"])
            p, beyond = (1.0 if size else gap["p"]), size - allowed
            if beyond > 0 and gap["error"] is not None:
                # the variance grows with the square of how far the gap is from the truth that is assumed
                own, far = gap["own_error"] ** 2, (beyond / size) ** 2
                p = stats.p_value(beyond, math.sqrt(own + far * (gap["error"] ** 2 - own)), gap["degrees"])
            found.append({**gap, "kind": kind, "p": float("nan") if p is None else p})
    family = _correct(found)
    for gap in found:
        gap["minimum_refused_gap"] = _detectable(gap, family, allowed)
    return found


def beyond(held: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the gaps that `judged` found, those that are shown to exceed what is allowed, the surest first."""
    shown = [gap for gap in held if gap["p_holm"] is not None and gap["p_holm"] < stats.SHOWN]
    return sorted(shown, key=lambda gap: (gap["p_holm"], -abs(gap["value"])))


def _correct(found: Sequence[dict[str, Any]]) -> int:
    """Take the p values of gaps as one family: `p` as stored, `p_holm`, and what the surest must reach all others. How
    many there are."""
    family = sum(not math.isnan(gap["p"]) for gap in found)
    for gap, p in zip(found, stats.holm([gap["p"] for gap in found]), strict=True):
        gap |= {"p": stats.plain(gap["p"]), "p_holm": stats.plain(p)}
        gap["minimum_detectable_difference"] = _detectable(gap, family)
    return family


def _detectable(gap: Mapping[str, Any], family: int, beyond: float = 0.0) -> float | None:
    if gap["error"] is None or not family:
        return None
    level = stats.SHOWN / family
    return stats.plain(stats.minimum_detectable_difference(gap["error"], gap["degrees"], level, gap["growth"], beyond))


def _of_kind(
    settings: Settings, sheet: Sheet, parsed: Parsed, task: str, groups: Mapping[str, Group]
) -> dict[str, Any]:
    enough = {name: group for name, group in groups.items() if group.people >= settings.evaluate.min_group}
    summed = _summed(sheet, parsed, task, enough)
    drawn = _replicated(settings, summed)
    entries = {
        name: {
            **(stats.spread(_macro(drawn[name]), group.people) if name in enough else stats.NOTHING),
            "n": len(group.rows),
            "people": group.people,
            "unreadable": stats.plain(group.unreadable),
            "too_few": name not in enough,
        }
        for name, group in groups.items()
    }
    pairs = [(a, b) for a, b in combinations(enough, 2) if min(enough[a].unreadable, enough[b].unreadable) < 0.5]
    found = [_gap(sheet, task, a, b, summed, enough) for a, b in pairs]
    return {"groups": entries, "gaps": [gap for gap in found if gap is not None]}


def _gap(
    sheet: Sheet, task: str, a: str, b: str, summed: Mapping[str, Sums], groups: Mapping[str, Group]
) -> dict[str, Any] | None:
    """The gap of two groups on the classes of both; if they share none, each on its own. None when undefined."""
    metric = metrics.of(tasks.get(task))
    terms = (metric.of_class or metric).terms
    assert terms is not None  # of every metric that a task may name
    parts = [{part: terms(sums.per_subject_SK) for part, sums in summed[name].items()} for name in (a, b)]
    parts = [{part: (num, den) for part, (num, den) in own.items() if den.any()} for own in parts]
    both = [part for part in parts[0] if part in parts[1]]
    if not both:
        parts = [_one_class(own) for own in parts]
        both = [part for part in parts[0] if part in parts[1]]
    if not both:
        return None
    items = Counter(item for item, _ in both)
    weights_K = np.array([1 / (len(items) * items[item]) for item, _ in both])
    num_gSK, den_gSK = (np.stack([np.stack([own[part][term] for part in both], 1) for own in parts]) for term in (0, 1))
    inside_gS = np.any(den_gSK > 0, axis=-1)
    pictures_gS = np.stack([_pictures(sheet, groups[name].rows) for name in (a, b)])
    places = np.cumsum(inside_gS.ravel()).reshape(inside_gS.shape) - 1
    of = gaps.Memberships(
        num_gSK[inside_gS],
        den_gSK[inside_gS],
        np.arange(inside_gS.sum()) < inside_gS[:1].sum(),
        pictures_gS[inside_gS],
        places[:, inside_gS.all(0)],
    )
    found = gaps.measure(of, weights_K)
    value, error, degrees = (round(float(each), 12) for each in (found.value, found.error, found.degrees))
    return {
        **{"a": a, "b": b, **stats.t_interval(value, error, degrees), "error": stats.plain(error)},
        **{"own_error": stats.plain(float(found.own_error)), "degrees": stats.plain(degrees)},
        "growth": [stats.plain(each) for each in found.growth(share=not metric.in_unit)],
        "p": stats.p_value(value, error, degrees),
    }


def _one_class(parts: Mapping[Part, tuple[Array, Array]]) -> dict[Part, tuple[Array, Array]]:
    """The mean over the classes of every item as a single quotient."""
    items: dict[str, list[tuple[Array, Array]]] = {}
    for (item, _), terms in parts.items():
        items.setdefault(item, []).append(terms)
    found = {}
    for item, classes in items.items():
        asked = sum(den.sum() for _, den in classes)
        shares = [asked / (len(classes) * den.sum()) for _, den in classes]
        num, den = (sum((share * one[term] for share, one in zip(shares, classes, strict=True))) for term in (0, 1))
        found[item, ""] = np.asarray(num), np.asarray(den)
    return found


def _pictures(sheet: Sheet, rows: Rows) -> Rows:
    """How many pictures of every person some questions are about."""
    return np.bincount(sheet.people[np.unique(sheet.faces[rows])], minlength=sheet.people_count)
