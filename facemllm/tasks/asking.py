"""Ways to ask an item, and reading the answers: the one place where a stored turn and a question meet.

`native` is the item's own form. `unseen` is that form in wordings that no training turn uses. `statement` makes a claim
that is true or false (half of them each, drawn). `lettered` shows the options behind letters, in a drawn order, with
"not visible" among them where the item can be hidden. A turn names its wording `item/index` (native), `item:way/index`
or `item:statement=value/index`; every choice is drawn by a hash of image and item, so that no other row can move it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

from facemllm.tasks.base import Item, Option, Question, Row, Task, draw
from facemllm.tasks.language import doubtful, normalise

NATIVE, UNSEEN, STATEMENT, LETTERED = "native", "unseen", "statement", "lettered"
WAYS = (NATIVE, UNSEEN, STATEMENT, LETTERED)

NOT_VISIBLE = "not_visible"
SHOWN = 8
"""Most options behind letters: of a longer list, the true one and others are drawn."""

_TRUTH = (Option(value="true", text="true"), Option(value="false", text="false"))
_STATEMENTS = ("True or false: {}.", "Is this true or false? {}.")
_TEMPLATE = re.compile(r"([^:/]+)(?::([a-z]+)(?:=([^/]+))?)?/(\d{1,3})")
_LETTER = re.compile(r"(?:(?:the )?(?:answer|letter|option)(?: is| :)? )*([a-h])(?: (?:[.:] )?(.+))?")
_YES_NO = {"true": "true", "correct": "true", "yes": "true", "false": "false", "incorrect": "false", "no": "false"}


@dataclass(frozen=True)
class Asked:
    """A question as it is put about one face: its wording, the words and the canonical value of the true answer."""

    question: Question
    template: str
    text: str
    reply: str
    answer: str


def ask(task: Task, item: Item, way: str, row: Row) -> Asked | None:
    """Ask an item of a row of `faces` in one way; None when the row does not know, or the item is not asked so."""
    image_id, label = str(row["image_id"]), item.label(row)
    if way == LETTERED:
        hidden = label is None and item.hidden is not None and item.hidden(row)
        return _lettered(task, item, image_id, NOT_VISIBLE if hidden else label)
    if label is None:
        return None
    if way == STATEMENT:
        return _statement(task, item, image_id, label)
    question = task.question(item.name)
    if way == UNSEEN:
        question = replace(question, templates=item.unseen, way=UNSEEN)
    if not question.templates:
        return None
    index = draw(len(question.templates), image_id, item.name)
    name = item.name if way == NATIVE else f"{item.name}:{UNSEEN}"
    return Asked(question, f"{name}/{index}", question.templates[index], item.reply(row, label), label)


def question_of(task: Task, turn: Mapping[str, Any]) -> tuple[Question, str] | None:
    """The question that a stored turn asks, as it was asked, and its wording; None if the task does not ask so."""
    found = _TEMPLATE.fullmatch(str(turn["template"]))
    if found is None or (item := task.find(found[1])) is None:
        return None
    way, claim, index = found[2] or NATIVE, found[3], int(found[4])
    question = task.question(item.name)
    if way == UNSEEN and claim is None:
        question = replace(question, templates=item.unseen, way=UNSEEN)
    elif way == STATEMENT and claim in item.claims:
        question = _stated(item, question, str(claim))
    elif way == LETTERED and claim is None and (shown := _shown(item, turn["options"] or ())):
        question = _with_letters(question, shown)
    elif way != NATIVE or claim is not None:
        return None
    return (question, question.templates[index]) if index < len(question.templates) else None


def read(task: Task, question: Question, text: str) -> str | None:
    """The canonical answer in a text, in the way the question was asked. None unless exactly one is plainly given."""
    if question.way == STATEMENT:
        words = normalise(text)
        return _YES_NO.get(words) if words else None
    if question.way == LETTERED:
        return _read_letter(task, question, text)
    return task.parse(question.item, text)


def _statement(task: Task, item: Item, image_id: str, label: str) -> Asked | None:
    """A claim about the item: in half of the cases the true one, if the item has several."""
    others = [value for value in item.claims if value != label]
    if label in item.claims and (not others or draw(2, image_id, item.name, "truth") == 0):
        claim, said = label, "true"
    elif others:
        claim, said = others[draw(len(others), image_id, item.name, "claim")], "false"
    else:
        return None
    question = _stated(item, task.question(item.name), claim)
    index = draw(len(_STATEMENTS), image_id, item.name, STATEMENT)
    return Asked(question, f"{item.name}:{STATEMENT}={claim}/{index}", question.templates[index], said, said)


def _stated(item: Item, question: Question, claim: str) -> Question:
    wordings = tuple(text.format(item.claims[claim]) for text in _STATEMENTS)
    return replace(question, form="statement", templates=wordings, options=_TRUTH, way=STATEMENT, claim=claim)


def _lettered(task: Task, item: Item, image_id: str, label: str | None) -> Asked | None:
    if label is None or item.form not in ("choice", "boolean"):
        return None
    drawn = sorted(item.options, key=lambda option: draw(2**32, image_id, item.name, "order", option.value))
    places = SHOWN if item.hidden is None else SHOWN - 1
    kept = {option.value for option in sorted(drawn, key=lambda option: option.value != label)[:places]}
    values = [option.value for option in drawn if option.value in kept]
    values += [] if item.hidden is None else [NOT_VISIBLE]
    question = _with_letters(task.question(item.name), _shown(item, values))
    index = draw(len(question.templates), image_id, item.name)
    reply = ascii_uppercase[values.index(label)]
    return Asked(question, f"{item.name}:{LETTERED}/{index}", question.templates[index], reply, label)


def _shown(item: Item, values: Sequence[str]) -> tuple[Option, ...]:
    """The options of these values in their order; empty when one is none of the item's."""
    known = {option.value: option for option in item.options}
    known[NOT_VISIBLE] = Option(value=NOT_VISIBLE, text="not visible")
    return tuple(known[value] for value in values) if all(value in known for value in values) else ()


def _with_letters(question: Question, shown: Sequence[Option]) -> Question:
    listed = " ".join(f"{letter}. {option.text}" for letter, option in zip(ascii_uppercase, shown, strict=False))
    return replace(
        question,
        form="lettered",
        templates=tuple(f"{text} {listed}. Answer with the letter." for text in question.templates),
        options=tuple(
            Option(value=option.value, text=letter) for letter, option in zip(ascii_uppercase, shown, strict=False)
        ),
        way=LETTERED,
    )


def _read_letter(task: Task, question: Question, text: str) -> str | None:
    """A letter that stands alone or before its own option's words, or those words alone. "A woman" is no letter."""
    words = normalise(text)
    if not words or doubtful(words):
        return None
    values = [option.value for option in question.options]
    item = task.item(question.item)
    if words in ("not visible", "cannot be seen"):
        return NOT_VISIBLE if NOT_VISIBLE in values else None
    found = _LETTER.fullmatch(words)
    if found is None:
        said = item.parse(text)
        return said if said in values else None
    place = ascii_uppercase.index(found[1].upper())
    if place >= len(values):
        return None
    if found[2] is None:
        return values[place]
    said = NOT_VISIBLE if found[2] == "not visible" else item.parse(found[2])
    if found[1] == "a" and said is not None:  # "a woman" names what it names, whatever stands behind the letter A
        whole = item.parse(text)
        return whole if whole == values[place] else None
    return said if said == values[place] else None
