"""Reading answers that are not in the item's own form: true or false of a claim, and letters of options.

Both may come with words: whatever an answer says twice has to agree, and words that cannot be read spoil it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_lowercase

from facemllm.tasks.answers import doubtful, normalise, only
from facemllm.tasks.base import Item, Option

NOT_VISIBLE = "not_visible"

_VERDICT = re.compile(
    r"(?:(?:so|thus|therefore|hence|indeed|i|d|would|say|think|believe|the|this|that|it|answer|statement|claim|sentence"
    r"|is|which) )*(not )?(?:(true|correct|right|accurate|yes)|false|incorrect|wrong|untrue|no)"
)
_IDLE = re.compile(r"(?:the |my |correct )*(?:answer|statement|claim|verdict|explanation|reason(?:ing)?)?")
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
    "pick select think say believe conclude it going go with boxed response selected selection be should that one this "
    "fits match matches falls within in into range describes corresponds to most likely probably closest leaning "
    "towards appropriate suitable definitely clearly conclusion . , :"
)
_AROUND = frozenset(_BESIDE.split())
_EXPLICIT = re.compile(r"\b(?:answer|option|letter|choice|choose|pick|select\w*|conclu\w*|fits|match\w*|boxed)\b")
_AGAINST = re.compile(r"\b(?:unseen|no|not|none|never|wrong|incorrect|false|except|least|rejected)\b")


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
    for clause in re.split(r" (?:[.,:]|because|since) ", plain):
        clause = clause.removeprefix("as ")
        if clause != _UNSEEN_WORD:  # "it is false that a hat can be seen"
            clause = re.sub(rf" ?(?:that )?{_UNSEEN_WORD}(?= is|$)", "", clause).strip()
        if _IDLE.fullmatch(clause):
            continue
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
        said = item.parse(words := " . ".join(rest))
        if said is None and item.denied(words) != claim:
            return None
        verdicts.append(str(said == claim).lower())
    return only(verdicts)


def letter(item: Item, options: Sequence[Option], text: str) -> str | None:
    """The value behind the one letter that an answer gives, or that its words name. "A woman" gives no letter.
    `options` are those behind the letters, in order."""
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
        if len(named) == 1 and _declared(item, words):
            return only(named)
        said = NOT_VISIBLE if _UNSEEN_WORD in rest.split() else item.parse(rest)
        if said not in values:
            return None
        named |= {said, values[0] if _starts_with_letter(item, said, words) else said}
    return only(named)


def _declared(item: Item, words: str) -> bool:
    """Whether the clauses of a text with a letter do nothing but give it, one of them as the answer, and the others
    speak of no option and against none: "Looking at the curls, the answer is (B)."."""
    clauses = [(bool(_LETTER.search(c) or _LETTER_A.search(c)), c) for c in re.split(r" [.,] ", words)]
    given = [_LETTER_A.sub(" ", _LETTER.sub(" ", clause)) for has, clause in clauses if has]
    others = " . ".join(clause for has, clause in clauses if not has)
    pure = all(_AROUND.issuperset(clause.split()) for clause in given) and (
        any(map(_EXPLICIT.search, given)) or (clauses[-1][0] and len(others.split()) > 2)
    )
    return pure and not item.names(others) and _AGAINST.search(others) is None


def _starts_with_letter(item: Item, said: str, words: str) -> bool:
    """Whether the `a` that an answer begins with is a letter: it stands before words that need no article."""
    return said != NOT_VISIBLE and words.startswith(f"a {item.option_for(said).text}")
