"""What an answer tells that nobody may ask: read of what the model writes freely, and of options of a client's own.

An answer tells of a subject if a task's own reader finds an answer to it, or if it holds a word in which people speak
of it. The words are those of the lexicon: an answer about something else may be held back for a word of two meanings.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from functools import cache

from facemllm import tasks
from facemllm.serve.asked.disguises import plain
from facemllm.serve.asked.lexicon import LEXICON
from facemllm.serve.asked.matching import Match
from facemllm.tasks.paraphrases import normal

_MORE: Mapping[str, str] = {
    "gender": (
        "he she him her his hers himself herself mr mrs ms miss missus sir madam lord king queen prince princess"
        " husband wife father mother dad mom mum son daughter brother sister uncle aunt grandfather grandmother"
        " actor actress businessman businesswoman schoolboy schoolgirl granny grandma grandpa"
    ),
    "age": "boy boys girl girls lad lads lass lasses wrinkle wrinkles wrinkled teens grandfather grandmother",
    "expression": "",
}
_NOTIONS: Mapping[str, str] = {
    "gender": "GENDER MAN",
    "age": "AGE CHILD",
    "expression": "EXPR HAPPY SAD SURPRISED AFRAID DISGUSTED ANGRY NEUTRAL MOODY",
}
_NO_ANSWER = frozenset(
    ["yes", "no", "unknown", "unsure", "unclear", "none", "neither", "other", "not sure", "cannot tell", "not visible"]
    + ["none of these", "can not tell", "do not know", "not applicable", "n a", "na", "maybe", "uncertain", "y", "n"]
    + ["true", "false", "present", "absent", "visible", "not present", "something else", "not known", "cannot say"]
    + ["nothing"]
)
_COLORS = frozenset(["HUE", "HAIRHUE", "EYEHUE", "COLOR"])
_OF_THINGS = frozenset(
    " ".join(LEXICON.words[n] for n in ("HAIR", "HAIRDO", "EYE", "BEARD", "HAT", "EYEWEAR", "FRINGE")).split()
)
_COLOR_OF_THING = re.compile(
    r"\b(?:black|white|others?)\b(?! (?:person|woman|man|face|skin|origin|descent|girl|boy)\b)"
)
_ANGLE = re.compile(r"\b\d+(?: \d+)? ?(?:degrees?|deg)\b")
_WITHOUT_COLOR = frozenset({"caption", "description"})
"""Items of whole faces: what is black or white there is said of the skin."""
_NUMBERED = frozenset({"age", "age_range"})


@cache
def _words(subject: str) -> frozenset[str]:
    said = " ".join([LEXICON.words[notion] for notion in _NOTIONS.get(subject, "").split()])
    return frozenset(f"{said} {_MORE.get(subject, '')}".split())


def tells(text: str, subject: str, names: Iterable[str]) -> bool:
    """Whether a text answers, or only touches on, a sensitive subject that is asked for by tasks of those names."""
    words = _ANGLE.sub(" ", plain(text)).split()
    if not _words(subject).isdisjoint(words) or (subject == "age" and any(map(str.isdecimal, words))):
        return True
    if subject == "ethnicity" and not _OF_THINGS.isdisjoint(words):  # "black hair", "the hair is white"
        text = _COLOR_OF_THING.sub(" ", " ".join(words))
    closed = (item for name in names for item in tasks.get(name).items if item.form != "open")
    return any(item.parse(text) is not None for item in closed)


def is_own(option: str, match: Match | None) -> bool:
    """Whether an option of a client's own says an answer of the item that its question asks for, and so means nothing
    else beside that question: "black" of hair."""
    words = frozenset[str]().union(*LEXICON.options.get(match.question.item, {}).values()) if match else frozenset()
    return bool(words) and words.issuperset(normal(option).split())


def nameable(option: str, taught: Container[str], match: Match | None) -> bool:
    """Whether an option of a client's own may be scored: it is an answer in `taught` (normalised), says yes, no or that
    it cannot be told, or is made of words that people use of faces. Colors are no answer to a question about a whole
    face, and numbers answer only a question for one."""
    said = plain(option)
    if said in _NO_ANSWER:
        return True
    item = match.question if match is not None else None
    whole = item is None or item.item in _WITHOUT_COLOR
    numbered = item is not None and (item.form == "number" or item.task in _NUMBERED)
    words = said.split()
    if not words or not all(word in LEXICON.notions or (numbered and word.isdecimal()) for word in words):
        return said in taught
    notions = frozenset[str]().union(*(LEXICON.notions.get(word, frozenset()) for word in words))
    if numbered and any(map(str.isdecimal, words)):
        return True
    return bool(notions) and not (whole and notions <= _COLORS)
