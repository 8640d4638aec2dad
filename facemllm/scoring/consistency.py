"""Consistency: whether the answers about one face can all be true, and whether wording changes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from facemllm import tasks
from facemllm.scoring import stats
from facemllm.scoring.contradictions import Checked, check, check_captions
from facemllm.scoring.metrics import Parsed, number
from facemllm.scoring.sheet import Rows, Sheet, Way
from facemllm.settings import Settings
from facemllm.tasks import asking

Marks = list[tuple[Rows, list[bool]]]
"""Questions, and whether the answer to each is what it should be."""


def measure(settings: Settings, sheet: Sheet, parsed: Parsed) -> dict[str, Any]:
    """`relations` between answers and `captions` against answers (the shares of checks that are broken in the model's
    and in the true answers, overall and one by one), and `ways` (accuracy of each other way to ask, and its agreement
    with the item's own form; of statements also the accuracy of a `blind` answer by the claim alone), as in
    `metrics.json`.

    Shares by relation are of the faces on which the model's, or the true, answers speak of it; `n` is the model's.
    """

    def shares(checked: Callable[[Sheet, Parsed], Checked]) -> dict[str, Any]:
        model, truth = checked(sheet, parsed), checked(sheet, sheet.answers)
        return {
            "model": _broken(settings, sheet, model),
            "truth": _broken(settings, sheet, truth),
            "by_relation": [entry for name in {**model, **truth} if (entry := _one(name, model, truth)) is not None],
        }

    return {"relations": shares(check), "captions": shares(check_captions), "ways": _ways(settings, sheet, parsed)}


def same(question: Any, one: str | None, other: str | None) -> bool:
    """Whether two answers to a closed question mean the same: equal, or numbers within a step of the option grid.
    What cannot be read means nothing."""
    if one is None or other is None:
        return False
    first, second = number(one), number(other)
    if question.form != "number" or first is None or second is None:
        return one == other
    grid = sorted(float(option.value) for option in question.options)
    return abs(first - second) <= grid[1] - grid[0]


def share(settings: Settings, sheet: Sheet, subjects: Rows, hits: Any, of: Any = None) -> dict[str, float | None]:
    """The share of hits among `of` (one each unless given), with its interval over the people in `subjects`."""
    if not len(subjects):
        return {"value": None, "low": None, "high": None}
    hits_N = np.asarray(hits, dtype=float)
    columns_NK = np.stack([hits_N, np.ones_like(hits_N) if of is None else np.asarray(of, dtype=float)], axis=1)
    part = stats.Sums("accuracy", stats.by_subject(subjects, columns_NK, sheet.people_count))
    drawn = stats.replicate({"share": part}, settings.evaluate.bootstrap, settings.seed)["share"]
    return stats.spread(drawn, len(np.unique(subjects)))


def _broken(settings: Settings, sheet: Sheet, found: Checked) -> dict[str, Any]:
    if not found:
        return {**share(settings, sheet, np.empty(0, dtype=np.int64), []), "n": 0}
    checks, broken = (np.sum([pair[part] for pair in found.values()], axis=0) for part in (0, 1))
    some = checks > 0
    return {**share(settings, sheet, sheet.people[some], broken[some], checks[some]), "n": int(checks.sum())}


def _one(name: str, model: Checked, truth: Checked) -> dict[str, Any] | None:
    """A relation's broken shares; None where neither answers say enough to check it."""
    nothing = np.zeros(1, dtype=bool), np.zeros(1, dtype=bool)
    counts = [[int(part.sum()) for part in who.get(name, nothing)] for who in (model, truth)]
    if not any(checks for checks, _ in counts):
        return None
    shares = [stats.plain(broken / checks) if checks else None for checks, broken in counts]
    return {"relation": name, "broken_by_model": shares[0], "broken_by_truth": shares[1], "n": counts[0][0]}


def _ways(settings: Settings, sheet: Sheet, parsed: Parsed) -> dict[str, Any]:
    right: dict[str, Marks] = {}
    agrees: dict[str, Marks] = {}
    for how, rows in sheet.ways.items():
        key = how.task, how.item
        question = sheet.questions[key]
        if question.form not in ("choice", "boolean", "number"):
            continue
        right.setdefault(how.way, []).append((rows, [_right(question, how, parsed[r], sheet.answers[r]) for r in rows]))
        if key in sheet.rows:
            both = rows[np.isin(sheet.faces[rows], sheet.faces[sheet.rows[key]])]
            outright = sheet.said(key, parsed)
            asked = replace(question, way=how.way, claim=how.claim)
            found = [_agree(asked, parsed[row], outright[sheet.faces[row]]) for row in both]
            agrees.setdefault(how.way, []).append((both, found))
    ways: dict[str, dict[str, Any]] = {
        way: {
            "accuracy": _pooled(settings, sheet, marks),
            "agreement": _pooled(settings, sheet, agrees.get(way, [])),
            "n": sum(len(rows) for rows, _ in marks),
        }
        for way, marks in right.items()
    }
    if asking.STATEMENT in ways:
        ways[asking.STATEMENT]["blind"] = _blind(sheet, right[asking.STATEMENT])
    return ways


def _blind(sheet: Sheet, marks: Marks) -> float | None:
    """The share of statements that are answered right without a look at the face, by what is more often true of each
    claim: some claims are rarely true."""
    most = [Counter(sheet.answers[row] for row in rows).most_common(1)[0][1] for rows, _ in marks]
    return stats.plain(sum(most) / sum(len(rows) for rows, _ in marks))


def _right(question: Any, how: Way, said: str | None, answer: str) -> bool:
    return said == answer if how.claim is not None else same(question, said, answer)


def _agree(asked: Any, said: str | None, outright: str | None) -> bool:
    if asked.claim is None or said is None or outright is None:
        return same(asked, said, outright)
    return said == asking.implied(tasks.get(asked.task), asked, outright)


def _pooled(settings: Settings, sheet: Sheet, marks: Sequence[tuple[Rows, list[bool]]]) -> dict[str, float | None]:
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(part for part, _ in marks)])
    return share(settings, sheet, sheet.subjects[rows], [hit for _, found in marks for hit in found])
