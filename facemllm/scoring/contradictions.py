"""Contradictions: whether all that was answered about one face can be true.

Relations are those of `relations`; apart from them, a caption states nothing that the answer to its question denies.
Answers assert attributes: a chosen style denies the other styles, a statement called true affirms its claim, a
caption affirms what it states and is silent about the rest. A relation is checked on a face where two questions or more
speak of it, and the true answers are checked like a model's: labels, too, break some.
Legend: F faces, A attributes, R relations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from facemllm.scoring.metrics import Parsed, facts, number
from facemllm.scoring.relations import RELATIONS, Relation
from facemllm.scoring.sheet import NATIVE, Sheet, Way
from facemllm.tasks.agreement import TOLERANCE

Mask = npt.NDArray[np.bool_]
Checked = dict[str, tuple[Mask, Mask]]
"""By relation, on which faces it is checked, and on which of them broken."""

_NAMES = tuple(dict.fromkeys(name for relation in RELATIONS for name in relation.attributes))
_PLACE = {name: place for place, name in enumerate(_NAMES)}


def check(sheet: Sheet, answers: Parsed) -> Checked:
    """Check every logical relation on every face of the sheet, from a model's parsed answers or from the true ones."""
    true_FA = np.zeros((len(sheet.images), len(_NAMES)), dtype=bool)
    false_FA = true_FA.copy()
    questions_FR = np.zeros((len(sheet.images), len(RELATIONS)), dtype=np.int16)
    for faces, affirmed, denied in _assertions(sheet, answers):
        true_FA[np.ix_(faces, _places(affirmed))] = True
        false_FA[np.ix_(faces, _places(denied))] = True
        about = [r for r, relation in enumerate(RELATIONS) if not {*affirmed, *denied}.isdisjoint(relation.attributes)]
        questions_FR[np.ix_(faces, np.array(about, dtype=np.intp))] += 1
    found = {}
    for place, relation in enumerate(RELATIONS):
        known, broken = _violated(relation, true_FA, true_FA | false_FA)
        known &= questions_FR[:, place] > 1
        found[str(relation)] = known, known & broken
    return found


def _violated(relation: Relation, true_FA: Mask, known_FA: Mask) -> tuple[Any, Any]:
    """On which faces enough is said to check a relation, and on which what is said breaks it."""
    names = _places(relation.names)
    if relation.kind == "exclusive":
        return known_FA[:, names].sum(1) > 1, true_FA[:, names].sum(1) > 1
    if relation.kind == "at_least_one":
        return known_FA[:, names].all(1), ~true_FA[:, names].any(1)
    given = _PLACE[str(relation.given)]
    return known_FA[:, given] & known_FA[:, names].any(1), true_FA[:, given] & true_FA[:, names].any(1)


def _assertions(sheet: Sheet, answers: Parsed) -> Iterator[tuple[npt.NDArray[Any], list[str], list[str]]]:
    """For every question and answer to it: the faces it was given about, the attributes it affirms and denies."""
    outright = [(Way(*key, NATIVE, None), rows) for key, rows in sheet.rows.items()]
    for how, rows in [*outright, *sheet.ways.items()]:
        question = sheet.questions[how.task, how.item]
        if question.form not in ("choice", "boolean") and how.item != "caption":
            continue
        said = np.asarray([answers[row] for row in rows], dtype=object)
        for answer in {text for text in said if text is not None}:
            affirmed, denied = _asserted(question, how.claim, answer)
            yield np.unique(sheet.faces[rows[said == answer]]), _spoken_of(affirmed), _spoken_of(denied)


def _asserted(question: Any, claim: str | None, answer: str) -> tuple[list[str], list[str]]:
    """Attributes that an answer affirms and denies."""
    if question.item == "caption":
        stated = (fact.partition("=") for fact in facts(answer))
        return [item if value == "yes" else value for item, _, value in stated], []
    if claim is not None and answer != "true":
        return [], [question.item if claim == "yes" else claim]
    value = answer if claim is None else claim
    if question.form == "boolean":
        return ([question.item], []) if value == "yes" else ([], [question.item])
    values = [option.value for option in question.options]
    return ([value], [other for other in values if other != value]) if value in values else ([], [])


def check_captions(sheet: Sheet, answers: Parsed) -> Checked:
    """Check on every face, item by item, that the caption agrees with the answer to the item's question."""
    return dict(_of_captions(sheet, answers))


def _of_captions(sheet: Sheet, answers: Parsed) -> Iterator[tuple[str, tuple[Mask, Mask]]]:
    captions = sheet.said(("caption", "caption"), answers)
    stated = [dict(fact.split("=", 1) for fact in facts(text) if "=" in fact) for text in captions]
    for key in sheet.rows:
        if sheet.questions[key].form not in ("choice", "boolean", "number"):
            continue
        said = sheet.said(key, answers)
        told = [own.get(key[1]) for own in stated]
        pairs = [(one, other) if one and other else None for one, other in zip(told, said, strict=True)]
        checked = np.array([pair is not None for pair in pairs])
        if checked.any():
            broken = np.array([pair is not None and _differ(key[1], *pair) for pair in pairs])
            yield f"the caption agrees on {key[1]}", (checked, broken)


def _differ(item: str, one: str, other: str) -> bool:
    first, second = number(one), number(other)
    if item in TOLERANCE and first is not None and second is not None:
        return abs(first - second) > TOLERANCE[item]
    return one != other


def _spoken_of(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in _PLACE]


def _places(names: Sequence[str]) -> npt.NDArray[np.intp]:
    return np.array([_PLACE[name] for name in names], dtype=np.intp)
