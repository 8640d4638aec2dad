"""Consistency: whether the answers about one face can all be true, and whether another wording or way changes them.

Relations are those of `knowledge.relations`; apart from them, a caption states nothing that the answer to its question
denies. Answers assert attributes: a chosen style denies the other styles, a statement called true affirms its claim, a
caption affirms what it states and is silent about the rest. A relation is checked on a face where two questions or more
speak of it, and the true answers are checked like a model's: labels, too, break some.
Legend: N answers, F faces, A attributes, R relations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from facemllm import tasks
from facemllm.scoring import stats
from facemllm.scoring.metrics import ACCURACY, Parsed, facts, most_frequent, number
from facemllm.scoring.sheet import Mask, Rows, Sheet, Variant, read_some
from facemllm.settings import Settings
from facemllm.tables import PREDICTIONS, open_table
from facemllm.tasks import asking
from facemllm.tasks.answers import TOLERANCE
from facemllm.tasks.asking import STATEMENT
from facemllm.tasks.characteristics import asserted
from facemllm.tasks.relations import RELATIONS

Checked = dict[str, tuple[Mask, Mask]]
"""By relation, on which faces it is checked, and on which of them broken."""
Marks = list[tuple[Rows, list[bool]]]
"""Questions, and whether the answer to each is what it should be."""

_NAMES = tuple(dict.fromkeys(name for relation in RELATIONS for name in relation.attributes))
_PLACE = {name: place for place, name in enumerate(_NAMES)}


def measure(settings: Settings, sheet: Sheet, parsed: Parsed, train: Sheet | None = None) -> dict[str, Any]:
    """`relations` between answers and `captions` against answers (the shares of checks that are broken in the model's
    and in the true answers, overall and one by one), and `ways` (accuracy of each other way to ask, its agreement
    with the item's own form, and the accuracy of that on the same faces, `outright`; of statements also the accuracy of
    a `blind` answer by the claim alone, as the questions of `train` teach it), as in `metrics.json`.

    Shares by relation are of the faces on which the model's, or the true, answers speak of it; `n` is the model's.
    """

    def shares(checked: Callable[[Sheet, Parsed], Checked]) -> dict[str, Any]:
        model, truth = checked(sheet, parsed), checked(sheet, sheet.answers)
        return {
            "model": _broken(settings, sheet, model),
            "truth": _broken(settings, sheet, truth),
            "by_relation": [entry for name in {**model, **truth} if (entry := _one(name, model, truth)) is not None],
        }

    ways = _ways(settings, sheet, parsed, train)
    return {"relations": shares(check), "captions": shares(check_captions), "ways": ways}


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
        return dict(stats.NOTHING)
    hits_N = np.asarray(hits, dtype=float)
    columns_NK = np.stack([hits_N, np.ones_like(hits_N) if of is None else np.asarray(of, dtype=float)], axis=1)
    part = stats.Sums(ACCURACY, stats.by_subject(subjects, columns_NK, sheet.people_count))
    drawn = stats.replicate({"share": part}, settings.evaluate.bootstrap, settings.seed)["share"]
    return stats.spread(drawn, len(np.unique(subjects)))


def check(sheet: Sheet, answers: Parsed) -> Checked:
    """Check every logical relation on every face of the sheet, from a model's parsed answers or from the true ones."""
    true_FA = np.zeros((len(sheet.images), len(_NAMES)), dtype=bool)
    false_FA = true_FA.copy()
    questions_FR = np.zeros((len(sheet.images), len(RELATIONS)), dtype=np.int16)
    for faces, affirmed, denied in assertions(sheet, answers, sheet.asked.items()):
        for labels_FA, names in ((true_FA, affirmed), (false_FA, denied)):
            places = np.array([_PLACE[name] for name in names if name in _PLACE], dtype=np.intp)
            labels_FA[np.ix_(faces, places)] = True
        about = [r for r, relation in enumerate(RELATIONS) if not {*affirmed, *denied}.isdisjoint(relation.attributes)]
        questions_FR[np.ix_(faces, np.array(about, dtype=np.intp))] += 1
    found = {}
    for place, relation in enumerate(RELATIONS):
        known, broken = relation.check(_PLACE, true_FA, true_FA | false_FA)
        known &= questions_FR[:, place] > 1
        found[str(relation)] = known, known & broken
    return found


def assertions(
    sheet: Sheet, answers: Parsed, asked: Iterable[tuple[Variant, Rows]]
) -> Iterator[tuple[npt.NDArray[Any], list[str], list[str]]]:
    """For every question of `asked` and answer to it: the faces it was given about, the attributes it affirms and
    denies. The question that opens a dialogue is about none."""
    for how, rows in asked:
        question = sheet.questions[how.task, how.item]
        if (question.form not in ("choice", "boolean") and how.item != "caption") or how.claim == asking.PRESENT:
            continue
        said = np.asarray([answers[row] for row in rows], dtype=object)
        for answer in {text for text in said if text is not None}:
            affirmed, denied = _asserted(replace(question, variant=how.variant, claim=how.claim), answer)
            yield np.unique(sheet.faces[rows[said == answer]]), affirmed, denied


def _asserted(question: Any, answer: str) -> tuple[list[str], list[str]]:
    """Attributes that an answer affirms and denies; a claim called false is denied, and affirms nothing."""
    if question.item == "caption":
        stated = (fact.partition("=") for fact in facts(answer))
        return [item if value == "yes" else value for item, _, value in stated], []
    affirmed, denied = asserted(tasks.get(question.task), question, answer)
    return ([], denied) if question.claim is not None and answer != "true" else (affirmed, denied)


def check_captions(sheet: Sheet, answers: Parsed) -> Checked:
    """Check on every face, item by item, that the caption agrees with the answer to the item's question."""
    found = {}
    captions = sheet.said(("caption", "caption"), answers)
    stated = [dict(fact.split("=", 1) for fact in facts(text) if "=" in fact) for text in captions]
    for key in sheet.rows:
        if sheet.questions[key].form not in ("choice", "boolean", "number"):
            continue
        pairs = list(zip((own.get(key[1]) for own in stated), sheet.said(key, answers), strict=True))
        checked = np.array([bool(one and other) for one, other in pairs])
        if checked.any():
            broken = np.array([bool(one and other) and _differ(key[1], one, other) for one, other in pairs])
            found[f"the caption agrees on {key[1]}"] = checked, broken
    return found


def _differ(item: str, one: str | None, other: str | None) -> bool:
    first, second = number(one), number(other)
    if item in TOLERANCE and first is not None and second is not None:
        return abs(first - second) > TOLERANCE[item]
    return one != other


def _broken(settings: Settings, sheet: Sheet, found: Checked) -> dict[str, Any]:
    if not found:
        return {**stats.NOTHING, "n": 0}
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


def _ways(settings: Settings, sheet: Sheet, parsed: Parsed, train: Sheet | None) -> dict[str, Any]:
    right: dict[str, Marks] = {}
    agrees: dict[str, Marks] = {}
    outright: dict[str, Marks] = {}
    for how, rows in sheet.variants.items():
        key = how.task, how.item
        question = sheet.questions[key]
        if question.form not in ("choice", "boolean", "number"):
            continue
        right.setdefault(how.variant, []).append(
            (rows, [_right(question, how, parsed[r], sheet.answers[r]) for r in rows])
        )
        if key in sheet.rows:
            both = rows[np.isin(sheet.faces[rows], sheet.faces[sheet.rows[key]])]
            said, true = sheet.said(key, parsed), sheet.said(key, sheet.answers)
            asked = replace(question, variant=how.variant, claim=how.claim)
            alike = [_agree(asked, parsed[row], said[sheet.faces[row]]) for row in both]
            agrees.setdefault(how.variant, []).append((both, alike))
            known = [same(question, said[face], true[face]) for face in sheet.faces[both]]
            outright.setdefault(how.variant, []).append((both, known))
    ways: dict[str, dict[str, Any]] = {
        way: {
            ACCURACY.name: _pooled(settings, sheet, marks),
            "agreement": _pooled(settings, sheet, agrees.get(way, [])),
            "outright": _pooled(settings, sheet, outright.get(way, [])),
            "n": sum(len(rows) for rows, _ in marks),
        }
        for way, marks in right.items()
    }
    if STATEMENT in ways and train is not None:
        ways[STATEMENT]["blind"] = _blind(sheet, train)
    return ways


def _blind(sheet: Sheet, train: Sheet) -> float | None:
    """The share of statements answered rightly without a look at the face, by what is more often true of each claim in
    training, of a claim that training lacks by what is more often true of all: some claims are rarely true."""
    learnt, asked = (
        {how: [own.answers[row] for row in rows] for how, rows in own.variants.items() if how.variant == STATEMENT}
        for own in (train, sheet)
    )
    if not learnt:
        return None
    usual = most_frequent([answer for answers in learnt.values() for answer in answers])
    said = {how: most_frequent(learnt[how]) if how in learnt else usual for how in asked}
    return stats.plain_mean(answer == said[how] for how, answers in asked.items() for answer in answers)


def _right(question: Any, how: Variant, said: str | None, answer: str) -> bool:
    return said == answer if how.claim is not None else same(question, said, answer)


def _agree(asked: Any, said: str | None, outright: str | None) -> bool:
    if asked.claim is None or said is None or outright is None:
        return same(asked, said, outright)
    return said == asking.implied(tasks.get(asked.task), asked, outright)


def _pooled(settings: Settings, sheet: Sheet, marks: Sequence[tuple[Rows, list[bool]]]) -> dict[str, float | None]:
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(part for part, _ in marks)])
    return share(settings, sheet, sheet.subjects[rows], [hit for _, found in marks for hit in found])


def generation(settings: Settings, sheet: Sheet, parsed: Parsed, table: Path) -> dict[str, Any] | None:
    """How often free generation gives the answer that scoring the options gave: `agreement` with its interval, `n`
    questions, the same `by_task`, the `unreadable` share of generated answers, and `both_unreadable`, the share of
    questions to which both ways gave nothing to read: no agreement. None where there is no such table.

    Numbers agree within a step of the option grid.
    """
    if not table.is_dir():
        return None
    rows, said = read_some(open_table(table, PREDICTIONS), sheet)
    by_task: dict[str, list[bool]] = {}
    at: list[int] = []
    for key, own in sheet.rows.items():
        asked = own[np.isin(own, rows)]
        by_task.setdefault(key[0], []).extend(same(sheet.questions[key], said[row], parsed[row]) for row in asked)
        at.extend(asked)
    agree = [hit for found in by_task.values() for hit in found]
    return {
        "agreement": share(settings, sheet, sheet.subjects[at], agree),
        "n": len(at),
        "by_task": {name: {"value": stats.plain_mean(own), "n": len(own)} for name, own in by_task.items() if own},
        "unreadable": stats.plain_mean(said[row] is None for row in at),
        "both_unreadable": stats.plain_mean(said[row] is parsed[row] is None for row in at),
    }
