"""Contradictions: whether all that was answered about one face can be true.

Relations are those of `knowledge.relations`; apart from them, a caption states nothing that the answer to its question
denies. Answers assert attributes: a chosen style denies the other styles, a statement called true affirms its claim, a
caption affirms what it states and is silent about the rest. A relation is checked on a face where two questions or more
speak of it, and the true answers are checked like a model's: labels, too, break some.
Legend: F faces, A attributes, R relations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from facemllm import tasks
from facemllm.knowledge.graph import asserted
from facemllm.knowledge.relations import RELATIONS
from facemllm.scoring.metrics import Parsed, facts, number
from facemllm.scoring.sheet import NATIVE, Sheet, Way
from facemllm.tasks import asking
from facemllm.tasks.answers import TOLERANCE

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
        known, broken = relation.check(_PLACE, true_FA, true_FA | false_FA)
        known &= questions_FR[:, place] > 1
        found[str(relation)] = known, known & broken
    return found


def _assertions(sheet: Sheet, answers: Parsed) -> Iterator[tuple[npt.NDArray[Any], list[str], list[str]]]:
    """For every question and answer to it: the faces it was given about, the attributes it affirms and denies. The
    question that opens a dialogue is about none."""
    outright = [(Way(*key, NATIVE, None), rows) for key, rows in sheet.rows.items()]
    for how, rows in [*outright, *sheet.ways.items()]:
        question = sheet.questions[how.task, how.item]
        if (question.form not in ("choice", "boolean") and how.item != "caption") or how.claim == asking.PRESENT:
            continue
        said = np.asarray([answers[row] for row in rows], dtype=object)
        for answer in {text for text in said if text is not None}:
            affirmed, denied = _asserted(replace(question, way=how.way, claim=how.claim), answer)
            yield np.unique(sheet.faces[rows[said == answer]]), _spoken_of(affirmed), _spoken_of(denied)


def _asserted(question: Any, answer: str) -> tuple[list[str], list[str]]:
    """Attributes that an answer affirms and denies; a claim called false is denied, and affirms nothing."""
    if question.item == "caption":
        stated = (fact.partition("=") for fact in facts(answer))
        return [item if value == "yes" else value for item, _, value in stated], []
    affirmed, denied = asserted(tasks.get(question.task), question, answer)
    return ([], denied) if question.claim is not None and answer != "true" else (affirmed, denied)


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
