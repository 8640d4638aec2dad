"""What may not be asked, whatever the model could say: rules by meaning, in several languages and through disguises.

Identification, verification, search, names, religion, orientation, politics, crime and honesty, nationality, health,
character and attractiveness are always refused. Gender, ethnicity, age and expression are refused unless the deployment
allows them, each with a written reason, which `describe` shows. The words of the rules are in `policy.yaml`.

What is told by words can be said in other words: the rules are a fence, not a proof. The model itself was taught to say
that such things cannot be told from a face.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.serve.asked.disguises import readings
from facemllm.serve.asked.lexicon import is_slip, lexicon, without_one
from facemllm.serve.asked.matching import Matcher

SENSITIVE: Mapping[str, tuple[str, ...]] = {
    "gender": ("gender",),
    "ethnicity": ("ethnicity",),
    "age": ("age", "age_range"),
    "expression": ("expression", "expression_8", "expression_135", "expression_compound"),
}
"""What a deployment must allow by name, and the tasks that ask for it. Other tasks that their definition calls sensitive
must be allowed by their own name."""
_ONLY_IF_NOT_ALLOWED = "ethnicity"
"""The rule that a deployment can lift; those for the other sensitive tasks are their own questions, by meaning."""
_IDENTIFICATION = "identification"
_SHORT_SLIP, _LONG_SLIP = 4, 6
"""Shorter words are never taken for slips; only longer ones for slips other than two letters swapped or one doubled."""
_INFLECTED = (
    "religion religious atheist attractive attractiveness intelligent intelligence criminal nationality immigrant immigration"
    " identity trustworthy political politics republican democrat disease diagnosis pregnant personality homosexual sexuality"
    " handsome gorgeous ethnicity buddhist diagnose disability alcoholic depression dangerous terrorist murderer celebrity"
)
_PROPER = r"[A-Z][\w'’.-]*[a-z](?:\s+(?:[a-z]{2,3}\s+)?[A-Z][\w'’.-]+)*"
_NAMED = re.compile(
    r"\b(?:[Ii]s|[Ii]sn't|[Ww]as|if|whether|that)\s+(?:this|that|it|he|she|th(?:e|is|at) (?:person|man|woman|guy|girl|boy|lady|face))\s+"
    rf"(?:really |actually |not |maybe |in fact |possibly )?({_PROPER})(?=\W*$|\s+(?:or|in|from|and)\b|\?)"
)
_NAMED_ABROAD = re.compile(
    r"\b(?:[Ii]st (?:das|er|sie|dies)|[Ee]st-ce|[Cc]'est|[Ee]s(?: este| esta| ese| él| ella)?|[ÈEèÉé](?: lui| lei| este| esta)?"
    rf"|[Cc]zy to|[Ээ]то) ({_PROPER})(?=\W*$)"
)
_ONE_NAME = re.compile(
    rf"\b(?:looks?|resembles?|reminds?)\s+(?:(?:exactly |a bit |just )*like|you of|me of)\s+({_PROPER})(?=\W*$)"
)
_FOLLOWS = (
    r"(?! s\b)(?= ?$| (?:in|from|for|on|and|please|pls|by|here|now|to|with|at|or|if|using|as|is|are|who|that|depicted|shown"
    r"|pictured|behind|immediately|online|based|via|anyway|again|exactly|right|today|quickly|without|so|s face|of|standing"
    r"|sitting|wearing|you|i|we|today|just|then|but|not|out|this|via|through|against|across|anywhere|somewhere|yet)\b)"
)
_ALONE = r"(?= ?$| (?:in|on|from|and|please|pls|here|or|now|for|to|at|by|with|so|is|are|was|down|up|online|who|using|against|match\w*)\b)"
_SHORTEST, _LONGEST = 2, 16


@dataclass(frozen=True)
class Refusal:
    """The rule that refuses, and one plain line of reason."""

    rule: str
    reason: str


@dataclass(frozen=True)
class _Rule:
    name: str
    about: str
    reason: str
    parts: tuple[str, ...]
    patterns: tuple[tuple[frozenset[str], str], ...]
    squeezed: tuple[str, ...]
    spared: re.Pattern[str] | None


@dataclass(frozen=True)
class _Rules:
    """Rules in order; `whole` and `stems` give for words and their beginnings which rule has them, `patterns` for a word
    the patterns that cannot do without it or another, and their rules."""

    rules: tuple[_Rule, ...]
    whole: Mapping[str, int]
    stems: Mapping[str, int]
    patterns: Mapping[str, tuple[tuple[int, str], ...]]
    slips: Mapping[str, tuple[str, ...]]

    def broken(self, words: str, squeezed: str, but: str | None = None) -> _Rule | None:
        """The first rule that plain words break, that of the name `but` aside."""
        tokens = words.split()
        told = self._told(tokens)
        latin = words.isascii()
        sought: dict[int, set[str]] = {}
        for token in tokens:
            for place, pattern in self.patterns.get(token, ()):
                sought.setdefault(place, set()).add(pattern)
        for place, rule in enumerate(self.rules):
            if rule.name == but:
                continue
            held = place in told or any(_compiled(pattern).search(words) for pattern in sought.get(place, ()))
            held = held or (not latin and any(part in words for part in rule.parts))
            held = held or (squeezed != "" and any(phrase in squeezed for phrase in rule.squeezed))
            if held and not (rule.spared is not None and self._harmless(place, rule, words, squeezed)):
                return rule
        return None

    def spelt(self, words: str) -> str:
        """The words with slips of the finger in what the rules look for put right."""
        return " ".join(self._meant(word) if len(word) > _SHORT_SLIP else word for word in words.split())

    def _meant(self, word: str) -> str:
        if word in self.patterns or word in self.whole or word in lexicon().notions:
            return word
        for part in (word, *without_one(word)):
            for meant in self.slips.get(part, ()):
                swapped = len(word) == len(meant) and sorted(word) == sorted(meant)
                doubled = len(set(word)) == len(set(meant)) and len(word) > len(meant)
                if (len(meant) > _LONG_SLIP or swapped or doubled) and is_slip(word, meant):
                    return meant
        return word

    def _told(self, tokens: Sequence[str]) -> set[int]:
        """Places of the rules that have one of the words, or its beginning."""
        found = {place for token in tokens if (place := self.whole.get(token)) is not None}
        for token in tokens:
            for length in range(_SHORTEST, min(len(token), _LONGEST) + 1):
                if (place := self.stems.get(token[:length])) is not None:
                    found.add(place)
        return found

    def _harmless(self, place: int, rule: _Rule, words: str, squeezed: str) -> bool:
        """Whether nothing is left that breaks the rule once harmless phrases are taken out."""
        assert rule.spared is not None
        left = " ".join(rule.spared.sub(" ", words).split())
        if left == words:
            return False
        return place not in self._told(left.split()) and not any(
            not needed.isdisjoint(left.split()) and _compiled(pattern).search(left) for needed, pattern in rule.patterns
        )


class Policy:
    """A deployment's policy. `allowed` gives for a sensitive task the written reason why it may be asked."""

    def __init__(self, allowed: Mapping[str, str]) -> None:
        """Raises UserError where a reason is missing or a task is not a sensitive one."""
        for task, reason in allowed.items():
            if not reason or not reason.strip():
                raise UserError(f"serve.policy.allowed.{task}: write down why it may be asked; null refuses it")
            if task not in SENSITIVE and task not in _called_sensitive():
                known = ", ".join((*SENSITIVE, *_called_sensitive()))
                raise UserError(f"serve.policy.allowed: '{task}' needs no leave; those that do are {known}")
        self._allowed = dict(allowed)
        withheld = [
            name
            for subject, names in SENSITIVE.items()
            if subject not in allowed and subject != _ONLY_IF_NOT_ALLOWED
            for name in names
        ]
        self._withheld = Matcher([tasks.get(name) for name in withheld]) if withheld else None

    def refuses(self, text: str) -> Refusal | None:
        """The first rule that a text breaks, in whatever words and disguise; None if it breaks none."""
        found = _rules()
        but = _ONLY_IF_NOT_ALLOWED if _ONLY_IF_NOT_ALLOWED in self._allowed else None
        for words, squeezed in readings(text):
            broken = found.broken(words, squeezed, but)
            if broken is None and (spelt := found.spelt(words)) != words:
                broken = found.broken(spelt, "", but)
            if broken is not None:
                return Refusal(broken.name, broken.reason)
        if (named := _NAMED.search(text) or _ONE_NAME.search(text) or _NAMED_ABROAD.search(text)) and not _ordinary(
            named[1]
        ):
            return Refusal(_IDENTIFICATION, next(r.reason for r in found.rules if r.name == _IDENTIFICATION))
        if self._withheld is not None and (match := self._withheld.match(text)):
            return self.refuses_task(match.question.task)
        return None

    def refuses_task(self, task: str) -> Refusal | None:
        """The subject for which a task is refused, because it asks for it or tells it in passing."""
        for subject in _subjects(task):
            if subject not in self._allowed:
                reason = f"this deployment does not answer {subject}; its policy names no reason to"
                return Refusal(subject, reason)
        return None

    def describe(self) -> dict[str, Any]:
        """The policy as data: what is always refused, and of sensitive tasks which are allowed and why."""
        return {
            "refused": [
                {"rule": rule.name, "about": rule.about, "reason": rule.reason}
                for rule in _rules().rules
                if rule.name not in self._allowed
            ],
            "sensitive": {
                subject: {"allowed": subject in self._allowed, "reason": self._allowed.get(subject)}
                for subject in (*SENSITIVE, *_called_sensitive())
            },
        }


def _ordinary(name: str) -> bool:
    """Whether what stands where a name would is ordinary words, written large."""
    known = lexicon().notions
    return all(word in known or word in _demonyms() for word in name.lower().split())


@cache
def _called_sensitive() -> tuple[str, ...]:
    """Tasks that their definition calls sensitive, beside those of `SENSITIVE`."""
    of_subjects = {name for names in SENSITIVE.values() for name in names}
    return tuple(name for name in tasks.all_names() if tasks.get(name).sensitive and name not in of_subjects)


@cache
def _subjects(task: str) -> tuple[str, ...]:
    own = tuple(subject for subject, names in SENSITIVE.items() if task in names)
    found = tasks.get(task)
    return (*own, *((task,) if found.sensitive and not own else ()), *found.reveals)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compiled when first looked for: all at once would cost a tenth of a second at start-up."""
    return re.compile(pattern)


@cache
def _stored() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return dict(yaml.load(Path(__file__).with_suffix(".yaml").read_bytes(), loader))  # noqa: S506 - a safe loader


@cache
def _demonyms() -> frozenset[str]:
    return frozenset(_stored()["demonyms"].split())


@cache
def _rules() -> _Rules:
    stored = dict(_stored())
    persons, demonyms = stored.pop("persons").replace(" ", "|"), stored.pop("demonyms").split()
    someone = rf"(?:the|this|that|these|those|a|an|my|our|your|any|each) (?:(?!of\b|in\b|on\b|is\b|s\b)\w+ ){{0,2}}?(?:{persons})"
    macros = {
        "{P}": rf"(?:(?:{someone}|him|her|them|people)\b|(?:it|this|that|these|those)\b{_ALONE})",
        "{X}": rf"(?:(?:{someone}|he|she|they|it|this|that|these|those|him|her|them|person|you)\b)",
        "{N}": f"(?:{persons})",
        "{E}": _FOLLOWS,
        "{D}": "|".join(demonyms),
    }

    def filled(pattern: str) -> str:
        for name, text in macros.items():
            pattern = pattern.replace(name, text)
        return rf"(?<!\S)(?:{pattern})"

    whole: dict[str, int] = {}
    stems: dict[str, int] = {}
    rules = []
    for place, (name, found) in enumerate(stored.items()):
        for word in found.get("words", "").split():
            (stems if word.endswith("*") else whole).setdefault(word.rstrip("*"), place)
        spared = "|".join(f"(?:{one})" for one in found.get("spared", ()))
        rules.append(
            _Rule(
                name=name,
                about=found["about"],
                reason=found["reason"],
                parts=tuple(map(str, found.get("parts", ()))),
                patterns=tuple(
                    (frozenset(demonyms if needed == "{D}" else needed.split()), filled(pattern))
                    for needed, pattern in found.get("patterns", ())
                ),
                squeezed=tuple(found.get("squeezed", ())),
                spared=re.compile(rf"\b(?:{spared})") if spared else None,
            )
        )
    patterns: dict[str, list[tuple[int, str]]] = {}
    for place, rule in enumerate(rules):
        for needed, pattern in rule.patterns:
            for word in needed:
                patterns.setdefault(word, []).append((place, pattern))
    slips: dict[str, list[str]] = {}
    for word in (*whole, *patterns, *_INFLECTED.split()):
        if len(word) > _SHORT_SLIP and word.isascii():
            for part in (word, *without_one(word)):
                slips.setdefault(part, []).append(word)
    return _Rules(
        tuple(rules),
        whole,
        stems,
        {word: tuple(found) for word, found in patterns.items()},
        {part: tuple(words) for part, words in slips.items()},
    )
