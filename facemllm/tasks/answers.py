"""From what a model gives to a canonical answer, for evaluation and serving alike.

Words: a text becomes lower-case words with single spaces, `,` and `.` kept as words of their own to mark where scopes
end, and every mention found in it is said to be affirmed, denied, or unclear. It refuses rather than guesses. `truth`
and `letter` read answers that are not in the item's own form: true or false of a claim, and letters of options. Both
may come with words: whatever an answer says twice has to agree, and words that cannot be read spoil it.

Probabilities over a question's options: `answer` is the one rule. A choice or a yes/no question is answered by its most
probable option, a number by the median over its grid, or the mean (`Item.center`), with two decimals.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from facemllm.tasks.base import Question
from facemllm.tasks.spoken import spoken, without_asides

MAX_TEXT = 2000
"""Longer answers are refused unread: no answer needs this, and reading stays cheap on hostile text."""

Stance = Literal["affirmed", "denied", "unclear"]

_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_UNITS += ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_SPELLED = re.compile(rf"\b(?:({'|'.join(_TENS)})(?: ({'|'.join(_UNITS[1:10])}))?|({'|'.join(_UNITS)}))\b")

_SAY = "say|estimate|guess|lean|describe|go|choose|pick|select|answer|call|classify|label|conclude|put|place"

# Words that take an answer back, leave it open, or speak of a thing that is not on the face.
_DOUBT = re.compile(
    rf"\b(?:maybe|perhaps|possibly|might|may|could|would(?! (?:be|{_SAY}))|(?<!answer )"
    rf"(?<!choice )(?<!guess )(?<!estimate )would be"
    r"|either|neither|or|whether|if|unless|unsure|unclear|unknown"
    r"|uncertain|cannot|can not|not sure|hard to|difficult to|impossible|holding|removed|took|used to|instead of"
    r"|hardly|barely|scarcely|far from|anything but|less than|fails? to|pretend(?:s|ing)?|formerly|lost|once|ago|then"
    r"|not (?:\w+ )?without|beside (?:her|him|them)|(?:taken|drawn|made) by|(?:mother|father|wife|husband|friend) of"
    r"|(?:his|her|man|woman|boy|girl|lady) (?:wife|husband|mother|father|friend|brother|sister|son|daughter)"
    r"|rather than|(?:is|are) (?:also )?possible|almost|nearly|behind (?:her|him|them)|hanging|lying|in the background"
    r"|of (?:the|a) (?:dog|cat|horse|animal|doll|statue|painting)"
    r"|on the (?:table|wall|desk|floor|shelf)|ignore (?:(?:all|any|the) )*(?:previous|prior|above|earlier))\b"
)
_FILLER = (
    r"(?:wearing|wear|have|having|has|had|see|with|a|an|any|the|some|visible|of|in|look|looking|seem|appear|to|be|is)"
)
_NEGATOR = r"(?:not|no 1|nobody|none|no|without|never|lacks|lack|lacking|nor)"
_DENIED_BEFORE = re.compile(rf"\b{_NEGATOR}(?: {_FILLER})* $")
_NEGATION_OPEN = re.compile(
    rf"\b{_NEGATOR}\b(?!.*\b(?:has|have|is|are|with|wears|wearing|but|shows)\b)"
    r"|\b(?:false|untrue|incorrect|wrong|not (?:true|correct|right|the case)) that\b"
)
_DENIED_AFTER = re.compile(
    r"^(?: (?:is|are|:) (?:ruled out|no|none|false|incorrect|wrong|absent|missing"
    r"|not (?:present|visible|there|worn|seen|correct))| absent| missing)\b"
)
_OPEN_AFTER = re.compile(r"^ (?:is|are|:) not\b(?! (?:wearing|looking|smiling|facing)\b)")


_NUMBER_START = re.compile(r"(?<![\w.])[+-]?\d")
_RANGE_BEFORE = re.compile(
    r"(?:\d(?: degrees| years)? ?(?:and|to|-|,)?(?: (?:about|around))? "
    r"|\b(?:over|under|above|below|than|least|most|nearly|almost|until|beyond|not) )$"
)
_QUESTION = re.compile(r"[^.!?;]*\?")
_ASKED = re.compile(
    r"^\W*(?:(?:in|from|at) )?(?:is|are|was|does|do|did|has|have|can|could|what|which|who|whose|how|where|when|why)\b"
    r"|\bor\b"
)
_PLAIN = str.maketrans("’−–_\n=", "'-- .:")


@dataclass(frozen=True)
class Mention:
    """A pattern found in a text: what it stands for, its numbers if any, and what the text says of it."""

    key: str
    number: str | None
    stance: Stance


@lru_cache(maxsize=64)  # a caption is read once for each of its facts
def normalise(text: str) -> str | None:
    """Plain words of a text, or None when it is too long. Questions in it are dropped: they answer nothing. A question
    mark behind what is no question ("a man? a woman") takes it all back: then there are no words."""
    if len(text) > MAX_TEXT:
        return None
    text = unicodedata.normalize("NFKC", text).lower()
    text = text.translate(_PLAIN)
    if "?" in text:  # the pattern looks for one from every letter on
        if not all(_ASKED.search(question) for question in _QUESTION.findall(text)):
            return ""
        text = _QUESTION.sub(" ", text)
    text = re.sub(r"(\d)(?: years?(?: old)?)? (?:or|and) (?:older|over|above|more|up)\b", r"\1+", text)
    text = text.replace("black and white", "monochrome")  # as pictures are
    text = re.sub(r"can't|can not", "cannot", text)
    text = re.sub(r"n't\b", " not", text.replace("won't", "will not"))
    text = re.sub(r"\b(an? (?:man|woman|boy|girl|lady))'s\b", r"\1s", text)  # "a man's hat" is no man
    text = re.sub(r"'s\b", "", text).replace("°", " degrees ")
    text = re.sub(r"(?<=\w)-|-(?!\d)", " ", text)  # a hyphen joins words; only a leading minus is a sign
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[;!]", " . ", text)
    text = re.sub(r",", " , ", text).replace(":", " : ")
    text = re.sub(r"[^\w\s.,:+-]", " ", text)
    text = re.sub(r"\s+", " ", text).strip(" .,:")
    text = without_asides(text)
    return _SPELLED.sub(_digits, re.sub(r"\s+", " ", text).strip(" .,:"))


def _digits(found: re.Match[str]) -> str:
    tens, unit, small = found.groups()
    return str(_UNITS.index(small) if small else _TENS[tens] + (_UNITS.index(unit) if unit else 0))


@lru_cache(maxsize=64)
def doubtful(text: str) -> bool:
    """Whether a normalised text hedges, offers alternatives, or speaks of something else than the face."""
    return _DOUBT.search(text) is not None


def assertions(text: str) -> str | None:
    """The normalised sentences of a text that do not hedge; None when it is too long."""
    words = normalise(text)
    return None if words is None else " . ".join(part for part in words.split(" . ") if not doubtful(part))


@lru_cache(maxsize=64)
def bounded(text: str) -> bool:
    """Whether a number in a normalised text is a bound or part of a range ("over 40", "30 to 35 years")."""
    return any(_RANGE_BEFORE.search(text[: number.start()]) for number in _NUMBER_START.finditer(text))


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern})(?= |$)")


def _occurrences(pattern: str, text: str) -> list[re.Match[str]]:
    """Where a pattern matches whole words of a normalised text. (A look-behind would cost five times as much.)"""
    compiled = _compiled(pattern)
    matches = []
    found = compiled.search(text)
    while found:
        whole = found.start() == 0 or text[found.start() - 1] == " "
        if whole:
            matches.append(found)
        found = compiled.search(text, found.end() if whole else found.start() + 1)
    return matches


def mentions(text: str, patterns: Iterable[tuple[str, str]]) -> list[Mention]:
    """What of (key, pattern) a normalised text mentions. A mention inside a longer one ("brown hair" in "dark brown
    hair") is not one. A pattern's first group, if it has one, is the number mentioned."""
    found = [(key, match) for key, pattern in patterns for match in _occurrences(pattern, text)]
    return [
        Mention(key, match.group(1) if match.re.groups else None, stance(text, *match.span()))
        for key, match in found
        if not any(_inside(match.span(), other.span()) for _, other in found)
    ]


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    longer = outer[1] - outer[0] > inner[1] - inner[0]
    return longer and outer[0] <= inner[0] and inner[1] <= outer[1]


def stance(text: str, start: int, end: int) -> Stance:
    """What a text says of the thing at [start, end). A negation further off in the sentence that could still govern it
    ("without a hat, earrings") makes it unclear."""
    sentence = text.rfind(" . ", 0, start)
    before = text[0 if sentence < 0 else sentence + 3 : start]
    if _DENIED_BEFORE.search(before) or _DENIED_AFTER.search(text[end:]):
        return "denied"
    return "unclear" if _NEGATION_OPEN.search(before) or _OPEN_AFTER.search(text[end:]) else "affirmed"


def listed(words: Sequence[str]) -> str:
    """Words as a list: "hair, nose and mouth"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def only(values: Iterable[str]) -> str | None:
    """The one distinct value, or None when there are none or several."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


# An inability or unwillingness of the one who answers ("I cannot help with that"), not of the picture ("not visible");
# or what `unanswerable` teaches.
_REFUSAL = re.compile(
    r"\bi (?:am|m) (?:unable|not (?:able|comfortable|permitted|allowed|programmed|designed|going))\b"
    r"|\bi (?:cannot|will not|would not|(?:would|d) rather not|do not want to|(?:must |have to )?decline|refuse)\b"
    r"(?! (?:see|find|detect|spot|notice)\b)"
    r"|\bi do not (?:feel comfortable|provide|make|guess|identify|analy[sz]e|comment|answer|assist|engage)\b"
    r"|\b(?:unable|not able|not possible for me) to (?:help|assist|answer|comply|provide|identify|determine|fulfil)"
    r"|\b(?:cannot|can not) (?:help|assist|comply|fulfil|answer)\b|\bagainst (?:my|our) (?:policy|policies|guidelines)"
    r"|\bcannot be (?:told|known|judged|determined) from (?:a|the|this) (?:face|picture|photo|image)\b"
    r"|\bas an ai\b|\bnot (?:appropriate|ethical) (?:for me )?to\b|\bi (?:am|m) sorry\b(?= ?(?:[.,]|$))"
)
_STATES = re.compile(
    r"\b(?:he|she|they|it|this|person|woman|man|individual|face|hair|eyes|head|age|answer|expression)\b(?: \w+){0,3}?"
    r" (?:is|are|has|have|looks?|seems?|appears?|wears?|shows?)\b(?! (?:not|against|beyond|outside|unable|inappropriate"
    r"|a (?:sensitive|private|personal)|sensitive|private|something))"
)
_SHORT = re.compile(r"(?:yes|no|true|false|[a-h]|\d+)")
_TURN = re.compile(r" [.:] | , (?=but|however|though)|\b(?:but|however|though)\b")


def refuses(text: str) -> bool:
    """Whether an answer declines to answer ("I'm sorry, I can't help with that") and states nothing besides. "It is not
    visible" declines nothing: it speaks of the picture."""
    words = normalise(spoken(text))
    if not words or _REFUSAL.search(words) is None:
        return False
    parts = [part.strip(" ,") for part in _TURN.split(words)]
    others = [part for part in parts if part and _REFUSAL.search(part) is None]
    return not any(_STATES.search(part) or _SHORT.fullmatch(part) for part in others)


TOLERANCE = {"age": 10.0, "yaw": 15.0, "pitch": 15.0, "roll": 15.0}
"""How far a number that words state may be from the item's before the two contradict: years, degrees."""


@dataclass(frozen=True)
class Answer:
    """An answered question: canonical value (None = not answered), the words that say it, probability by value."""

    value: str | None
    text: str
    scores: dict[str, float]


def answer(question: Question, probabilities: Sequence[float], greedy: int | None) -> Answer:
    """Answer a closed question from the probabilities of its options, in their order. `greedy` is the option the model
    would have written of its own accord, None when it would have written something else: then there is no value, only
    the text that comes nearest. Nor is there one when a probability is not a number: a broken model answers nothing."""
    assert question.options, f"{question.task}.{question.item} is an open question"
    weights = [float(p) for p in probabilities]
    assert len(weights) == len(question.options)
    scores = {option.value: weight for option, weight in zip(question.options, weights, strict=True)}
    if not all(map(math.isfinite, weights)) or sum(weights) <= 0:
        return Answer(None, "", scores)
    if question.form == "number":
        text = f"{round(question.number(weights), 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0
        return Answer(None if greedy is None else text, text, scores)
    best = question.options[max(range(len(weights)), key=weights.__getitem__)]
    return Answer(None if greedy is None else best.value, best.text, scores)
