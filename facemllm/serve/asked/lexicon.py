"""The words in which people ask about a face, read from `lexicon.yaml`: which notion a word stands for, which notions
make up an item's question, which words any question may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_SHORT = 4
"""Words of so many letters are seldom mistyped, and lie near many others."""

_SETS = ("soft", "persons", "asked", "elsewhere", "doings", "face", "no_slips")

LONGEST = 24
"""Letters of a word that may be a slip for another."""


@dataclass(frozen=True)
class Lexicon:
    """`words` gives the words of each notion, and `notions` what each known word stands for, nothing for one that any
    question may hold. `phrases` are patterns and what stands for them. `signs` are of an item the notions that ask for
    it, each a set, and those that may stand beside. `soft` notions may stand beside any; those of `persons` name whom
    the question is about unless nothing else is asked. `options` are the words of an item's options. `asked` are verbs
    behind a `you` that means the one who answers, `elsewhere` words of things that are no face,
    `doings` of what is done with them or how they are, `face` words of which
    a question about a face holds one. `shortened` gives known words by what is left of them without one letter, and
    `no_slips` are words of their own that lie next to one."""

    notions: Mapping[str, frozenset[str]]
    phrases: tuple[tuple[re.Pattern[str], str], ...]
    signs: Mapping[str, tuple[tuple[frozenset[str], ...], frozenset[str]]]
    soft: frozenset[str]
    persons: frozenset[str]
    options: Mapping[str, Mapping[str, frozenset[str]]]
    asked: frozenset[str]
    elsewhere: frozenset[str]
    doings: frozenset[str]
    face: frozenset[str]
    no_slips: frozenset[str]
    shortened: Mapping[str, tuple[str, ...]]
    words: Mapping[str, str]

    def meant(self, word: str) -> str | None:
        """The known word that one is a slip of the finger for; one without a notion only if no letter is another."""
        if not _SHORT <= len(word) <= LONGEST:
            return None
        if word in self.no_slips or word in self.elsewhere or word in self.doings:
            return None
        for part in (word, *without_one(word)):
            for known in self.shortened.get(part, ()):
                near = self.notions[known] or sorted(word) == sorted(known) or set(word) == set(known)
                if near and is_slip(word, known):
                    return known
        return None


def _lexicon() -> Lexicon:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    stored = yaml.load(Path(__file__).with_suffix(".yaml").read_bytes(), loader)
    notions = _notions(stored)
    shortened: dict[str, list[str]] = {}
    for word in notions:
        for part in (word, *without_one(word)) if len(word) >= _SHORT else ():
            shortened.setdefault(part, []).append(word)
    return Lexicon(
        notions=notions,
        phrases=tuple((re.compile(rf"\b(?:{pattern})\b"), word) for pattern, word in stored["phrases"]),
        signs={
            item: (tuple(_set(sign) for sign in found["asks"]), _set(found["beside"]))
            for item, found in stored["signs"].items()
        },
        options={
            item: {value: _set(stored["notions"].get(words[1:], words)) for value, words in options.items()}
            for item, options in stored["options"].items()
        },
        shortened={part: tuple(words) for part, words in shortened.items()},
        words=stored["notions"],
        **{name: _set(stored[name]) for name in _SETS},
    )


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _notions(stored: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {word: set() for word in stored["plain"].split()}
    for notion, words in stored["notions"].items():
        for word in words.split():
            found.setdefault(word, set()).add(notion)
    return {word: frozenset(notions) for word, notions in found.items()}


def without_one(word: str) -> list[str]:
    """The word without any one of its letters but the first."""
    return [word[:place] + word[place + 1 :] for place in range(1, len(word))]


def is_slip(word: str, meant: str) -> bool:
    """Whether a word, its first letter aside, differs from the one that is meant by two letters in wrong order, by one
    doubled or not doubled, or, if it is long enough, by one letter more, fewer or other."""
    if word[0] != meant[0] or abs(len(word) - len(meant)) > 1:
        return False
    if len(word) == len(meant):
        off = [place for place in range(len(word)) if word[place] != meant[place]]
        if len(off) == 2:
            return off[1] == off[0] + 1 and word[off[0]] == meant[off[1]] and word[off[1]] == meant[off[0]]
        return len(off) == 1 and len(meant) > _SHORT + 1
    longer, shorter = (word, meant) if len(word) > len(meant) else (meant, word)
    place = next((n for n, char in enumerate(shorter) if char != longer[n]), len(shorter))
    if longer[:place] + longer[place + 1 :] != shorter:
        return False
    return len(meant) > _SHORT or longer[place] == longer[place - 1]


LEXICON = _lexicon()
