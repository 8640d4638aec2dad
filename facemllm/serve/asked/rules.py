"""The rules of what may not be asked, read from `rules.yaml`, and which of them a text breaks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from facemllm.serve.asked.lexicon import LEXICON, LONGEST, is_slip, without_one

_SHORTEST, _LONGEST = 2, 16
"""Letters of a stem."""
_SHORT_SLIP, _LONG_SLIP = 4, 5
"""Words that are shorter are never taken for slips, those that are no longer only where two letters are swapped; only
longer ones for slips other than two letters swapped or one doubled."""
_FOLLOWS = (
    r"(?! s\b)(?= ?$| (?:in|from|for|on|and|please|pls|by|here|now|to|with|at|or|if|using|as|is|are|who|that|depicted"
    r"|shown|pictured|behind|immediately|online|based|via|anyway|again|exactly|right|today|quickly|without|so|of|standing"
    r"|sitting|wearing|you|i|we|just|then|but|not|out|this|through|against|across|anywhere|somewhere|yet)\b)"
)
"""What may follow an object: not a possessive ("this person's hair"), nor a noun ("her hair")."""
_ALONE = (
    r"(?= ?$| (?:in|on|from|and|please|pls|here|or|now|for|to|at|by|with|so|is|are|was|down|up|online|who|using|against"
    r"|match\w*)\b)"
)
"""What may follow a `this` that stands for a person."""


@dataclass(frozen=True)
class Rule:
    """One rule: `parts` are pieces of text in scripts other than Latin, `patterns` regular expressions over plain
    words, each with the words of which one must be there, `squeezed` phrases as they read without spaces; `spared` are
    harmless phrases."""

    name: str
    about: str
    reason: str
    parts: tuple[str, ...]
    patterns: tuple[tuple[frozenset[str], str], ...]
    squeezed: tuple[str, ...]
    spared: re.Pattern[str] | None


@dataclass(frozen=True)
class Rules:
    """Rules in order; `whole` and `stems` give for words and their beginnings which rule has them, `patterns` for a
    word the patterns that ask for it, and their rules; `slips` such words by what is left without one letter."""

    rules: tuple[Rule, ...]
    demonyms: frozenset[str]
    whole: Mapping[str, int]
    stems: Mapping[str, int]
    patterns: Mapping[str, tuple[tuple[int, str], ...]]
    slips: Mapping[str, tuple[str, ...]]

    def named(self, name: str) -> Rule:
        """The rule of that name. Raises KeyError."""
        return {rule.name: rule for rule in self.rules}[name]

    def broken(self, words: str, squeezed: str, but: str | None = None) -> Rule | None:
        """The first rule that plain words break, that of the name `but` aside."""
        tokens = words.split()
        by_word = self._by_word(tokens)
        latin = words.isascii()
        sought: dict[int, set[str]] = {}
        for token in tokens:
            for place, pattern in self.patterns.get(token, ()):
                sought.setdefault(place, set()).add(pattern)
        for place, rule in enumerate(self.rules):
            if rule.name == but:
                continue
            held = place in by_word or any(_compiled(pattern).search(words) for pattern in sought.get(place, ()))
            held = held or (not latin and any(part in words for part in rule.parts))
            held = held or (squeezed != "" and any(phrase in squeezed for phrase in rule.squeezed))
            if held and not (rule.spared is not None and self._harmless(place, rule, words)):
                return rule
        return None

    def spelt(self, words: str) -> str:
        """The words with slips of the finger in what the rules look for put right."""
        return " ".join(self._meant(word) if _SHORT_SLIP <= len(word) <= LONGEST else word for word in words.split())

    def _meant(self, word: str) -> str:
        if word in self.patterns or word in self.whole or word in LEXICON.notions:
            return word
        for part in (word, *without_one(word)):
            for meant in self.slips.get(part, ()):
                swapped = len(word) == len(meant) and sorted(word) == sorted(meant)
                doubled = len(set(word)) == len(set(meant)) and len(word) > len(meant)
                near = swapped or len(meant) > _LONG_SLIP or (doubled and len(meant) > _SHORT_SLIP)
                if near and is_slip(word, meant):
                    return meant
        return word

    def _by_word(self, tokens: Sequence[str]) -> set[int]:
        """Places of the rules that have one of the words, or its beginning."""
        found = {place for token in tokens if (place := self.whole.get(token)) is not None}
        for token in tokens:
            for length in range(_SHORTEST, min(len(token), _LONGEST) + 1):
                if (place := self.stems.get(token[:length])) is not None:
                    found.add(place)
        return found

    def _harmless(self, place: int, rule: Rule, words: str) -> bool:
        """Whether nothing is left that breaks the rule once harmless phrases are taken out."""
        assert rule.spared is not None
        left = " ".join(rule.spared.sub(" ", words).split())
        if left == words:
            return False
        return place not in self._by_word(left.split()) and not any(
            not needed.isdisjoint(left.split()) and _compiled(pattern).search(left) for needed, pattern in rule.patterns
        )


@cache
def rules() -> Rules:
    """The rules, read once."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    stored = dict(yaml.load(Path(__file__).with_suffix(".yaml").read_bytes(), loader))
    persons, demonyms, also = (stored.pop(name).split() for name in ("persons", "demonyms", "also_mistyped"))
    macros = _macros("|".join(persons), "|".join(demonyms))
    whole: dict[str, int] = {}
    stems: dict[str, int] = {}
    patterns: dict[str, list[tuple[int, str]]] = {}
    read = [_rule(name, found, macros, frozenset(demonyms)) for name, found in stored.items()]
    for place, (rule, found) in enumerate(zip(read, stored.values(), strict=True)):
        for word in found.get("words", "").split():
            (stems if word.endswith("*") else whole).setdefault(word.rstrip("*"), place)
        for needed, pattern in rule.patterns:
            for word in needed:
                patterns.setdefault(word, []).append((place, pattern))
    slips: dict[str, list[str]] = {}
    for word in (*whole, *patterns, *also, *persons):
        for part in (word, *without_one(word)) if len(word) >= _SHORT_SLIP and word.isascii() else ():
            slips.setdefault(part, []).append(word)
    return Rules(
        rules=tuple(read),
        demonyms=frozenset(demonyms),
        whole=whole,
        stems=stems,
        patterns={word: tuple(found) for word, found in patterns.items()},
        slips={part: tuple(words) for part, words in slips.items()},
    )


def _rule(name: str, found: Mapping[str, Any], macros: Mapping[str, str], demonyms: frozenset[str]) -> Rule:
    def filled(pattern: str) -> str:
        for macro, text in macros.items():
            pattern = pattern.replace(macro, text)
        return rf"(?<!\S)(?:{pattern})"

    spared = "|".join(f"(?:{one})" for one in found.get("spared", ()))
    return Rule(
        name=name,
        about=found["about"],
        reason=found["reason"],
        parts=tuple(map(str, found.get("parts", ()))),
        patterns=tuple(
            (demonyms if needed == "{D}" else frozenset(needed.split()), filled(pattern))
            for needed, pattern in found.get("patterns", ())
        ),
        squeezed=tuple(found.get("squeezed", ())),
        spared=re.compile(rf"\b(?:{spared})") if spared else None,
    )


def _macros(persons: str, demonyms: str) -> Mapping[str, str]:
    """What stands in a pattern for a person ({P}; {X} as a subject, too), for words for persons, for what may follow an
    object, for nationalities."""
    someone = (
        r"(?:the|this|that|these|those|a|an|my|our|your|any|each)"
        rf" (?:(?!of\b|in\b|on\b|is\b|s\b)\w+ ){{0,2}}?(?:{persons})"
    )
    return {
        "{P}": rf"(?:(?:{someone}|him|her|them|people)\b|(?:it|this|that|these|those)\b{_ALONE})",
        "{X}": rf"(?:(?:{someone}|he|she|they|it|this|that|these|those|him|her|them|person|you)\b)",
        "{N}": f"(?:{persons})",
        "{E}": _FOLLOWS,
        "{D}": demonyms,
    }


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compiled when first looked for: all at once would cost a tenth of a second at start-up."""
    return re.compile(pattern)
