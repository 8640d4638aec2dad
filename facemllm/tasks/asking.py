"""Variants of a question, and reading the answers: the one place where a stored turn and a question meet.

`native` is the item's own form. `unseen` is that form in wordings that no training turn uses. `statement` makes a claim
that is true or false (half of them each, drawn). `lettered` shows the options behind letters, in a drawn order, with
"not visible" among them where the item can be hidden. `dialogue` asks whether a thing is there and, after a yes, on.
A turn names its wording `item/index` (native; the item's paraphrases are counted on from its templates),
`item:variant/index` or `item:variant=claim/index`, the claim being the value that a statement is about, or `present` in
the question that opens a dialogue. Every choice is drawn by a hash of image and item, so that no other row can move it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from string import ascii_uppercase
from typing import Any, NamedTuple

from facemllm.core.digests import draw, drawn
from facemllm.tasks.answers import MAX_TEXT, normalise
from facemllm.tasks.base import FollowUp, Item, Option, Question, Row, Task
from facemllm.tasks.committed import committed, conceded, laid_out, letters
from facemllm.tasks.spoken import concluded, earlier_words, last_word, spoken
from facemllm.tasks.variants import NOT_VISIBLE, letter, truth

NATIVE, UNSEEN, STATEMENT, LETTERED, DIALOGUE = "native", "unseen", "statement", "lettered", "dialogue"
VARIANTS = (NATIVE, UNSEEN, STATEMENT, LETTERED, DIALOGUE)
"""All variants; `ask` knows all but dialogue, which is more than one question."""

PRESENT = "present"
CLAIMS = 4
"""Most statements about one item of a face in training: the true one and others."""
SHOWN = 8
"""Most options behind letters: of a longer list, the true one and others are drawn."""
TOPICS = 2
"""Most things that a dialogue opens with."""

_TRUTH = (Option(value="true", text="true"), Option(value="false", text="false"))
_STATEMENTS = ("True or false: {}.", "Is it true or false that {}?")
_TEMPLATE = re.compile(r"([^:/]+)(?::([a-z]+)(?:=([^/]+))?)?/(\d{1,4})")


class Asked(NamedTuple):
    """A question as it is put about one face: its wording, the words and the canonical value of the true answer."""

    question: Question
    template: str
    text: str
    reply: str
    answer: str


@dataclass(frozen=True)
class _Worded:
    """A question with the names of its wordings."""

    question: Question
    templates: tuple[str, ...]

    def asked(self, index: int, reply: str, answer: str) -> Asked:
        """The question in one of its wordings, and its true answer."""
        return Asked(self.question, self.templates[index], self.question.templates[index], reply, answer)


def ask(task: Task, item: Item, variant: str, row: Row) -> Asked | None:
    """Ask an item of a row of `faces` in one variant; None when the row does not know, or the item is not asked so."""
    label = item.label(row)
    if variant == LETTERED:
        return _lettered(task, item, row, label)
    if label is None:
        return None
    image_id = row["image_id"]
    if variant == STATEMENT:
        return _statement(task, item, image_id, label)
    worded = _worded(task, item, variant)
    if not worded.templates:
        return None
    index = item.wording(row) if variant == NATIVE else draw(len(worded.templates), image_id, item.name)
    return worded.asked(index, item.reply(row, label), label)


def claims(task: Task, item: Item, row: Row) -> list[Asked]:
    """What is true of an item as a statement, and as statements up to `CLAIMS - 1` of its other values, drawn. Empty
    when the row does not know, or the item has no claims."""
    label = item.label(row)
    others = [value for value in item.claims if value != label]
    if label is None or not others:
        return []
    image_id = row["image_id"]
    false = _drawn_of(others, CLAIMS - 1, image_id, item.name, STATEMENT)
    said = [(label, "true"), *((value, "false") for value in false)]
    return [_put(_stated(task, item, claim), image_id, answer, answer) for claim, answer in said]


def dialogue(task: Task, row: Row) -> list[Asked]:
    """A dialogue about a row: whether a thing is there and, where it is, which one; then a second thing alike. All
    after the first follow the one before. Empty when the row does not know enough for two questions."""
    image_id = row["image_id"]
    known = [(follow, answer) for follow in task.follow_ups if (answer := _present(task, follow, row))]
    turns: list[Asked] = []
    for follow, answer in _drawn_of(known, TOPICS, image_id, DIALOGUE):
        turns.append(_put(_opening(task, follow), image_id, answer, answer))
        if answer == "yes":
            item = task.item(follow.item)
            label = str(item.label(row))
            turns.append(_put(_followed(task, follow), image_id, item.reply(row, label), label))
    return turns if len(turns) > 1 else []


def question_of(task: Task, turn: Mapping[str, Any]) -> Question | None:
    """The question that a stored turn asks, and the way it asks it; None if the task does not ask so. The words are
    those of its message: outright, the index is that of the wordings which the turn was made with."""
    found = _TEMPLATE.fullmatch(str(turn["template"]))
    if found is None or (item := task.find(found[1])) is None:
        return None
    question = _question(task, item, found[2] or NATIVE, found[3], turn)
    if question is None or question.variant == NATIVE:
        return question  # an edit of the wordings counts them anew, and tables of before stay readable
    return question if int(found[4]) < len(question.templates) else None


def read(task: Task, question: Question, text: str) -> str | None:
    """The canonical answer in a text, as the question was asked. None unless exactly one is plainly given. What a model
    thinks aloud is no part of it; what it calls its final answer is all of it; and an answer that it concludes with, or
    commits to, is one unless what it says besides is another."""
    item, said = task.item(question.item), spoken(text)
    if item.form == "open":
        return item.parse(said)
    said = laid_out(said, item.name, partial(_is_option, item))
    finals, said = earlier_words(said), last_word(said)
    value = _committed_to(task, item, question, said)
    return None if any(_committed_to(task, item, question, one) not in (None, value) for one in set(finals)) else value


def _is_option(item: Item, cell: str) -> bool:
    words = normalise(cell) or ""
    return item.form != "several" and (item.names(words) or re.fullmatch("[a-h]", words) is not None)


def _committed_to(task: Task, item: Item, question: Question, said: str) -> str | None:
    value = _read(task, item, question, said)
    if value is not None:
        return value
    if parts := concluded(said):
        value = _read(task, item, question, parts[1])
        if value is not None:
            return None if _gainsaid(task, item, question, value, parts[0]) else value
    if item.form == "several" or len(said) > MAX_TEXT:
        return None
    for part, rest in committed(said):
        value = _read(task, item, question, part)
        if (
            value is not None
            and not _gainsaid(task, item, question, value, rest)
            and not _rivals(question, value, rest)
        ):
            return value
    if (parts := conceded(said)) and not (item.names(normalise(parts[0]) or "") or _rivals(question, None, parts[0])):
        return _read(task, item, question, parts[1])
    return None


def _gainsaid(task: Task, item: Item, question: Question, value: str, rest: str) -> bool:
    """Whether the rest of an answer gives another value, or denies this one."""
    others = {_read(task, item, question, rest)}
    if (other := item.parse(rest)) is not None:
        others.add(implied(task, question, other) or other)
    denied = item.denied(normalise(rest) or "")
    return not others <= {value, None} or (denied is not None and implied(task, question, denied) == value)


def _rivals(question: Question, value: str | None, rest: str) -> bool:
    """Whether the rest of an answer gives the letter of another option."""
    own = [letter for letter, option in zip(ascii_uppercase, question.options, strict=False) if option.value == value]
    return question.variant == LETTERED and not letters(rest) <= set(own)


def _read(task: Task, item: Item, question: Question, text: str) -> str | None:
    if question.variant == STATEMENT:
        return truth(item, str(question.claim), text)
    if question.variant == LETTERED:
        return letter(item, question.options, text)
    if question.variant == DIALOGUE and question.claim is not None:
        follow = task.follow_up(question.item)
        return None if follow is None else follow.opener.parse(text)
    return item.parse(text)


def implied(task: Task, question: Question, answer: str) -> str | None:
    """What a question, as it was asked, has to be answered if `answer` answers its item in the item's own form. None
    when that does not follow: a letter is not among those shown, or the answer is none of the item's options."""
    if question.variant == STATEMENT:
        return None if answer not in task.item(question.item).claims else str(answer == question.claim).lower()
    if question.variant == LETTERED:
        return answer if any(option.value == answer for option in question.options) else None
    if question.variant == DIALOGUE and question.claim is not None:
        follow = task.follow_up(question.item)
        return None if follow is None else "no" if answer == follow.absent else "yes"
    return answer


def _question(task: Task, item: Item, variant: str, claim: str | None, turn: Mapping[str, Any]) -> Question | None:
    if variant == STATEMENT:
        return _stated(task, item, claim).question if claim in item.claims else None
    if variant == DIALOGUE:
        follow = task.follow_up(item.name)
        if follow is None or claim not in (None, PRESENT):
            return None
        return (_followed if claim is None else _opening)(task, follow).question
    if claim is not None:
        return None
    if variant == LETTERED:
        values = tuple(turn["options"] or ())
        return _with_letters(task, item, values).question if values and _known(item, values) else None
    return _worded(task, item, variant).question if variant in (NATIVE, UNSEEN) else None


def _worded(task: Task, item: Item, variant: str) -> _Worded:
    assert variant in (NATIVE, UNSEEN), variant

    def make() -> Question:
        question = task.question(item.name)
        if variant == NATIVE:
            return replace(question, templates=(*question.templates, *item.paraphrases))
        return replace(question, templates=item.unseen, variant=UNSEEN)

    return _once(task, (item.name, variant), make)


def _once(task: Task, key: tuple[Any, ...], make: Callable[[], Question]) -> _Worded:
    found: _Worded | None = task.memo.get(key)
    if found is None:
        found = task.memo[key] = _named(make())
    return found


def _named(question: Question) -> _Worded:
    variant = "" if question.variant == NATIVE else f":{question.variant}"
    claim = "" if question.claim is None else f"={question.claim}"
    return _Worded(question, tuple(f"{question.item}{variant}{claim}/{n}" for n in range(len(question.templates))))


def _put(worded: _Worded, image_id: str, reply: str, answer: str) -> Asked:
    """A question in a wording that is drawn for the variant and the claim, too."""
    question = worded.question
    index = draw(len(worded.templates), image_id, question.item, question.variant, question.claim or "")
    return worded.asked(index, reply, answer)


def _statement(task: Task, item: Item, image_id: str, label: str) -> Asked | None:
    """A claim about the item: in half of the cases the true one."""
    others = [value for value in item.claims if value != label]
    if not others:
        return None
    false, other, index = drawn((2, len(others), len(_STATEMENTS)), image_id, item.name, STATEMENT)
    said = "false" if false else "true"
    return _stated(task, item, others[other] if false else label).asked(index, said, said)


def _stated(task: Task, item: Item, claim: str | None) -> _Worded:
    def make() -> Question:
        wordings = tuple(text.format(item.claims[str(claim)]) for text in _STATEMENTS)
        question = task.question(item.name)
        return replace(question, form="statement", templates=wordings, options=_TRUTH, variant=STATEMENT, claim=claim)

    return _once(task, (item.name, STATEMENT, claim), make)


def _present(task: Task, follow: FollowUp, row: Row) -> str | None:
    item = task.item(follow.item)
    label = item.label(row)
    if label is None:
        return "no" if item.hidden is not None and item.hidden(row) else None
    return "no" if label == follow.absent else "yes"


def _opening(task: Task, follow: FollowUp) -> _Worded:
    def make() -> Question:
        asked = {name: getattr(follow.opener, name) for name in ("form", "templates", "options")}
        return replace(task.question(follow.item), variant=DIALOGUE, claim=PRESENT, **asked)

    return _once(task, (follow.item, DIALOGUE, PRESENT), make)


def _followed(task: Task, follow: FollowUp) -> _Worded:
    question = task.question(follow.item)
    return _once(task, (follow.item, DIALOGUE), lambda: replace(question, templates=follow.templates, variant=DIALOGUE))


def _lettered(task: Task, item: Item, row: Row, label: str | None) -> Asked | None:
    if item.form not in ("choice", "boolean"):
        return None
    if label is None:
        if item.hidden is None or not item.hidden(row):
            return None
        label = NOT_VISIBLE
    image_id = row["image_id"]
    shown = [option.value for option in item.options]
    places = SHOWN if item.hidden is None else SHOWN - 1
    if len(shown) > places and label != NOT_VISIBLE:
        shown = _drawn_of([value for value in shown if value != label], places - 1, image_id, item.name, LETTERED)
        shown.insert(draw(places, image_id, item.name, "place"), label)
    else:
        shown = _drawn_of(shown, places, image_id, item.name, LETTERED)
    values = (*shown, *(() if item.hidden is None else (NOT_VISIBLE,)))
    worded = _with_letters(task, item, values)
    index = draw(len(worded.templates), image_id, item.name)
    return worded.asked(index, ascii_uppercase[values.index(label)], label)


def _drawn_of(things: Sequence[Any], count: int, *parts: str) -> list[Any]:
    """At most `count` of the things, in an order of their own, both drawn by a hash of `parts`."""
    order, total = list(things), len(things)
    for place, jump in enumerate(drawn(range(total, max(total - count, 0), -1), *parts)):
        order[place], order[place + jump] = order[place + jump], order[place]
    return order[:count]


def _known(item: Item, values: Sequence[str]) -> bool:
    known = {option.value for option in item.options} | {NOT_VISIBLE}
    return len(values) <= SHOWN and known.issuperset(values)


def _with_letters(task: Task, item: Item, values: tuple[str, ...]) -> _Worded:
    def make() -> Question:
        words = {option.value: option.text for option in item.options} | {NOT_VISIBLE: "not visible"}
        listed = " ".join(f"{letter}. {words[value]}" for letter, value in zip(ascii_uppercase, values, strict=False))
        question = task.question(item.name)
        wordings = tuple(f"{text} {listed}. Answer with the letter." for text in question.templates)
        options = tuple(map(_letter_of, values, ascii_uppercase))
        return replace(question, form="lettered", templates=wordings, options=options, variant=LETTERED)

    return _once(task, (item.name, LETTERED, values), make) if len(values) <= _FEW else _named(make())


_FEW = 4
"""Of so many options all orders are remembered (24); of more there would be too many."""


@cache
def _letter_of(value: str, letter: str) -> Option:
    return Option(value=value, text=letter)
