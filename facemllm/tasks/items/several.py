"""A set of things, answered in free order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from facemllm.tasks.base import Form, Option, Row
from facemllm.tasks.language import doubtful, mentions, normalise

NONE = "none"
"""The empty set, as value and as answer."""

_SMALL = r"(?:the|a|an|of|in|on|and|also|as well as|both|only|all|is|are|can|be|which|here|i|see|these|this|,|\.|:)"


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A member that a set may have: its canonical value, the words that say it, patterns that name it."""

    value: str
    text: str
    patterns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Several:
    """A set of `things`; canonical as their values in alphabetical order, `a;b`, or `none`.

    `source` gives the values of a row. `around` is a pattern of words that may stand around the things in an answer;
    any other word makes it unreadable, since it may name something that is not known here.
    """

    name: str
    templates: tuple[str, ...]
    things: tuple[Thing, ...]
    source: Callable[[Row], Iterable[str] | None]
    around: str
    unseen: tuple[str, ...] = ()
    form: Form = "several"
    options: tuple[Option, ...] = ()
    hidden: Callable[[Row], bool] | None = None

    @property
    def claims(self) -> Mapping[str, str]:
        """None: a claim about a set would be several claims."""
        return {}

    def reply(self, row: Row, label: str) -> str:
        """The things in words: "hair, nose and mouth"."""
        texts = [thing.text for thing in self.things if thing.value in label.split(";")]
        return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1]))) if texts else NONE

    def label(self, row: Row) -> str | None:
        """The row's set."""
        found = self.source(row)
        return None if found is None else self._text(found)

    def option_for(self, label: str) -> Option:
        """A set has no options. Raises ValueError."""
        raise ValueError(f"{self.name} asks for several things: it has no options")

    def mention(self, label: str) -> str | None:
        """A caption does not list sets."""
        return None

    def parse(self, text: str) -> str | None:
        """The set of things that the text lists. A denied one is not in it; only denied ones say nothing."""
        words = normalise(text)
        if not words or doubtful(words):
            return None
        if self._empty.fullmatch(words):
            return NONE
        found = mentions(words, self._patterns)
        named = {m.key for m in found if m.stance == "affirmed"}
        denied = {m.key for m in found if m.stance == "denied"}
        if not named or named & denied or any(m.stance == "unclear" for m in found):
            return None
        return self._text(named) if self._known.fullmatch(f" {words}") else None

    def _text(self, values: Iterable[str]) -> str:
        return ";".join(sorted(values)) or NONE

    @cached_property
    def _patterns(self) -> list[tuple[str, str]]:
        return [(thing.value, pattern) for thing in self.things for pattern in thing.patterns]

    @cached_property
    def _empty(self) -> re.Pattern[str]:
        return re.compile(rf"(?:none|nothing|no parts?)(?: (?:{_SMALL}|{self.around}))*")

    @cached_property
    def _known(self) -> re.Pattern[str]:
        """Nothing but things, words around them, and `not` or `but` before what is denied."""
        things = "|".join(pattern for _, pattern in self._patterns)
        return re.compile(rf"(?: (?:{things}|{_SMALL}|{self.around}|but|not|no|without)(?= |$))+")
