"""From what a model gives to a canonical answer, for evaluation and serving alike.

`answer` is the one rule for probabilities over a question's options: a choice or a yes/no question is answered by its
most probable option, a number by the expectation over its grid, with two decimals. `truth` and `letter` read answers
that are not in the item's own form: true or false of a claim, and letters of options. Both may come with words:
whatever an answer says twice has to agree, and words that cannot be read spoil it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from facemllm.tasks.base import Item, Option, Question
from facemllm.tasks.language import doubtful, normalise, only

NOT_VISIBLE = "not_visible"
TOLERANCE = {"age": 10.0, "yaw": 15.0, "pitch": 15.0, "roll": 15.0}
"""How far a number that words state may be from the item's before the two contradict: years, degrees."""

_VERDICT = re.compile(
    r"(?:(?:so|thus|therefore|hence|indeed|i|d|would|say|think|believe|the|this|that|it|answer|statement|claim|sentence"
    r"|is|which) )*(not )?(?:(true|correct|right|accurate|yes)|false|incorrect|wrong|untrue|no)"
)
_UNSEEN = re.compile(
    r"\b(?:the )?(?:(?:it|they|hair|eyes?|eyewear|color|style) )*(?:(?:is|are) )?(?:not visible|cannot be seen)\b"
)
_UNSEEN_WORD = "unseen"
_LETTER = re.compile(r"(?<!\bi )\b[b-h]\b")  # not the d of "I'd"
_LETTER_A = re.compile(
    r"(?:^|(?:\b(?:answer|option|letter|choice|choose|pick|select|so|therefore|thus|hence|boxed|and|with)|[.,:])"
    r"(?: it)?(?: is)?(?: :)? |\bit is )a(?= [.,:]|$)|\b(?:answer|option|letter|choice)(?: is)?(?: :)? a\b"
)
_BESIDE = (
    "so therefore thus hence the my correct right best final answer option letter choice is i d m would will choose "
    "pick select think say believe it going go with boxed . , :"
)
_AROUND = frozenset(_BESIDE.split())


@dataclass(frozen=True)
class Answer:
    """An answered question: canonical value (None = not answered), the words that say it, probability by value."""

    value: str | None
    text: str
    scores: dict[str, float]


def answer(question: Question, probabilities: Sequence[float], greedy: int | None) -> Answer:
    """Answer a closed question from the probabilities of its options, in their order.

    `greedy` is the option the model would have written of its own accord, None when it would have written something
    else: then there is no value, only the text that comes nearest. Nor is there one when a probability is not a number:
    a broken model answers nothing.
    """
    assert question.options, f"{question.task}.{question.item} is an open question"
    weights = [float(p) for p in probabilities]
    assert len(weights) == len(question.options)
    scores = {option.value: weight for option, weight in zip(question.options, weights, strict=True)}
    if not all(map(math.isfinite, weights)) or sum(weights) <= 0:
        return Answer(None, "", scores)
    if question.form == "number":
        total = sum(weights)
        mean = sum(float(option.value) * weight for option, weight in zip(question.options, weights, strict=True))
        text = f"{round(mean / total, 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0
        return Answer(None if greedy is None else text, text, scores)
    best = question.options[max(range(len(weights)), key=weights.__getitem__)]
    return Answer(None if greedy is None else best.value, best.text, scores)


def truth(item: Item, claim: str, text: str) -> str | None:
    """`true` or `false` of a claim. Words beside the verdict have to restate the item, and to agree with it."""
    words = normalise(text)
    if not words:
        return None
    restated = f" {normalise(item.claims[claim])} "
    plain = f" {words} ".replace(restated, f" {_UNSEEN_WORD} ").strip()
    if doubtful(plain):
        return None
    verdicts, rest = [], []
    for clause in re.split(r" [.,:] ", plain):
        if found := _VERDICT.fullmatch(clause):
            if found[1] and not found[2]:
                return None
            verdicts.append("true" if found[2] and not found[1] else "false")
        elif clause == _UNSEEN_WORD:
            verdicts.append("true")
        else:
            rest.append(clause)
    if not verdicts or set(plain.split()) <= {_UNSEEN_WORD}:
        return None
    if rest:
        said = item.parse(" . ".join(rest))
        if said is None:
            return None
        verdicts.append(str(said == claim).lower())
    return only(verdicts)


def letter(item: Item, options: Sequence[Option], text: str) -> str | None:
    """The value behind the one letter that an answer gives, or that its words name. "A woman" gives no letter.

    `options` are those behind the letters, in order.
    """
    words = normalise(text)
    if not words:
        return None
    values = [option.value for option in options]
    if NOT_VISIBLE in values:
        words = _UNSEEN.sub(_UNSEEN_WORD, words)
    if doubtful(words):
        return None
    given = {found.group() for found in _LETTER.finditer(words)} | {"a" for _ in _LETTER_A.finditer(words)}
    if any(ascii_lowercase.index(one) >= len(values) for one in given):
        return None
    named = {values[ascii_lowercase.index(one)] for one in given}
    rest = _LETTER_A.sub(" ", _LETTER.sub(" ", words)) if given else words
    if not _AROUND.issuperset(rest.split()):
        said = NOT_VISIBLE if _UNSEEN_WORD in rest.split() else item.parse(rest)
        if said not in values:
            return None
        named |= {said, values[0] if _starts_with_letter(item, said, words) else said}
    return only(named)


def _starts_with_letter(item: Item, said: str, words: str) -> bool:
    """Whether the `a` that an answer begins with is a letter: it stands before words that need no article."""
    return said != NOT_VISIBLE and words.startswith(f"a {item.option_for(said).text}")
