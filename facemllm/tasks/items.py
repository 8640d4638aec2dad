"""Kinds of items: one of several, yes or no, a number, a set, free text. Each is data and a strict reader."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from facemllm.tasks.answers import bounded, doubtful, listed, mentions, normalise, only
from facemllm.tasks.base import Form, Item, Option, Row, attribute, number_text
from facemllm.tasks.spoken import IN_PICTURE, LEADING

Words = tuple[str, tuple[str, ...]]
"""The words that a caption would use of a thing, and patterns that name it."""

_NOTHING = ""  # key of mentions that name no option, as "beard" alone
_OTHER = "other"  # key of mentions of something else
_LEAD = re.compile(rf"^(?:(?:{LEADING}|colou?r|style|they|are|describe|call|classify|label|as|{IN_PICTURE}) )+")


@dataclass(frozen=True, kw_only=True)
class Choice(Item):
    """One of several exclusive options.

    `patterns` are regular expressions that name an option anywhere in an answer; `words` are short names that count
    only as the whole answer ("Brown."), and next to a mention they contradict it ("brown and gray hair").
    `absent` is the option that a caption keeps silent about, affirmed by denying one of `absence` ("no glasses").
    `others` are patterns of longer phrases that name none of the options ("left of center").
    """

    source: Callable[[Row], str | None]
    patterns: Mapping[str, tuple[str, ...]]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absent: str | None = None
    absence: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    claim: str = "{} can be seen"
    form: Form = "choice"

    @cached_property
    def claims(self) -> Mapping[str, str]:
        """A claim an option."""
        return {option.value: self.claim.format(option.text) for option in self.options}

    def label(self, row: Row) -> str | None:
        """The source's value if it is one of the options."""
        value = self.source(row)
        return value if value in self._by_value else None

    def mention(self, label: str) -> str | None:
        """The option's text, unless it says that something is absent, or what is understood is no option."""
        return None if label == self.absent or label not in self._by_value else self._by_value[label].text

    def parse(self, text: str) -> str | None:
        """The one option that the text plainly names."""
        words = normalise(text)
        if not words or doubtful(words):
            return None
        if (whole := _LEAD.sub("", words)) in self._exact:
            return self._exact[whole]
        first = self._exact.get(re.split(" [.,] ", whole)[0])  # "gray, with some black strands"
        found = [m for m in mentions(words, self._patterns) if m.key != _OTHER]
        if any(m.stance == "unclear" for m in found):
            return None
        named = [m.key for m in found if m.key and m.stance == "affirmed"]
        named += [self.absent for m in found if m.key == _NOTHING and m.stance == "denied" and self.absent]
        denied = {m.key for m in found if m.key and m.stance == "denied"}
        answer = only(named)
        return None if answer in denied or first not in (None, answer) or self._contradicted(words, answer) else answer

    def denied(self, words: str) -> str | None:
        """The one option that a normalised text denies, and says nothing else of."""
        found = [m for m in mentions(words, self._patterns) if m.key != _OTHER]
        return only(m.key for m in found) if found and all(m.stance == "denied" for m in found) else None

    def names(self, words: str) -> bool:
        """Whether any option is named at all."""
        short = {word for names in self.words.values() for name in names for word in name.split()}
        return bool(mentions(words, self._patterns)) or not short.isdisjoint(words.split())

    def _contradicted(self, words: str, answer: str | None) -> bool:
        others = "|".join(word for value, names in self.words.items() if value != answer for word in names)
        if not others:
            return False
        own = "|".join(p for value, p in self._patterns if value == answer)
        before = rf"\b(?:{others})(?: and| to| with| ,)? (?:{own})(?!\w)"
        after = rf"\b(?:{own})(?: and| to| with| ,) (?:{others})(?= [.,]|$)"
        return any(
            not re.fullmatch(own, found.group())  # "dark brown hair" may itself begin with another option's word
            for pattern in (before, after)
            for found in re.finditer(pattern, words)
        )

    @cached_property
    def _exact(self) -> dict[str, str]:
        exact = {word: value for value, names in self.words.items() for word in names}
        for option in self.options:
            exact |= {str(normalise(text)): option.value for text in (option.value, option.text)}
        return exact

    @cached_property
    def _patterns(self) -> list[tuple[str, str]]:
        named = [(value, p) for value, patterns in self.patterns.items() for p in patterns]
        return [*named, *((_NOTHING, word) for word in self.absence), *((_OTHER, words) for words in self.others)]


_YES, _NO = "yes|yeah|yep|true|correct", "no|nope|false|incorrect"
_NOT = "(?:probably|likely|certainly|definitely|absolutely|of course) not|not at all"
_WORD = re.compile(rf"(?:(?:{LEADING}|a) )*?(?:({_YES})|{_NO}|{_NOT})(?: (?:indeed|definitely|certainly))?")
_ANY_WORD = re.compile(rf"(?<!not )\b(?:{_YES}|{_NO})$")
_TAG = re.compile(
    r"(?:(?:yes|(no)) )?(?:he|she|it|they|there|this person|the person|the (?:wo)?man)"
    r" (?:is|are|has|have|does|do|wears)( not)?"
)


@dataclass(frozen=True, kw_only=True)
class Boolean(Item):
    """A thing that is there or not. `text` mentions it in a caption; `nouns` are patterns that name it. `source` tells
    from a row whether it is there; without one, the attribute of the item's name does."""

    text: str
    nouns: tuple[str, ...]
    source: Callable[[Row], bool | None] | None = None
    claim: str = "{} can be seen"
    denial: str = "{} cannot be seen"
    form: Form = "boolean"
    options: tuple[Option, ...] = (Option(value="yes", text="yes"), Option(value="no", text="no"))

    @cached_property
    def claims(self) -> Mapping[str, str]:
        """That the thing is there, and that it is not."""
        return {"yes": self.claim.format(self.text), "no": self.denial.format(self.text)}

    def label(self, row: Row) -> str | None:
        """yes or no as it is there or not."""
        value = attribute(row, self.name) if self.source is None else self.source(row)
        return None if value is None else "yes" if value else "no"

    def names(self, words: str) -> bool:
        """Whether the thing is named at all."""
        said = re.search(rf"\b(?:{_YES}|{_NO})\b", words)
        return said is not None or bool(mentions(words, [(self.name, noun) for noun in self.nouns]))

    def mention(self, label: str) -> str | None:
        """The thing's words if it is there."""
        return self.text if label == "yes" else None

    def parse(self, text: str) -> str | None:
        """yes or no, from the word, from an affirmed or denied mention of the thing, or from both if they agree."""
        words = normalise(text)
        if not words or doubtful(words):
            return None
        answers = []
        for clause in re.split(r" [.,:] ", words):
            if word := _WORD.fullmatch(clause):
                answers.append("yes" if word.group(1) else "no")
            elif tag := _TAG.fullmatch(clause):
                answers += ["no"] if tag.group(1) else []
                answers.append("no" if tag.group(2) else "yes")
            elif _ANY_WORD.search(clause):  # "User says no"
                return None
        found = mentions(words, [(self.name, noun) for noun in self.nouns])
        if any(m.stance == "unclear" for m in found):
            return None
        return only(answers + ["yes" if m.stance == "affirmed" else "no" for m in found])


_NUMBER = r"(?:(?:about|around|roughly|approximately|by) )*([+-]?\d{1,3}(?:\.\d+)?)"


@dataclass(frozen=True, kw_only=True)
class Number(Item):
    """A number answered on a grid, `options` in rising order. It makes no claims: how near is near enough?

    `readings` are (sign, pattern) that state it anywhere in an answer, `N` standing for the number; without `N` the
    pattern states zero. `short` are such pairs that count only as the whole answer, `lead` words aside.
    """

    source: Callable[[Row], float | None]
    low: float
    high: float
    readings: tuple[tuple[int, str], ...]
    short: tuple[tuple[int, str], ...]
    lead: str
    form: Form = "number"

    def label(self, row: Row) -> str | None:
        """The exact number as text; None beyond what is possible."""
        value = self.source(row)
        return number_text(value) if value is not None and self.low <= value <= self.high else None

    def option_for(self, label: str) -> Option:
        """The nearest option, the smaller of two."""
        value, grid = float(label), self._grid
        above = min(bisect_left(grid, value), len(grid) - 1)
        below = max(above - 1, 0)
        return self.options[below if value - grid[below] <= grid[above] - value else above]

    def mention(self, label: str) -> str | None:
        """The nearest option's text."""
        return self.option_for(label).text

    def names(self, words: str) -> bool:
        """Whether any number is named at all."""
        return re.search(r"\d", words) is not None

    def parse(self, text: str) -> str | None:
        """The one number plainly stated, with its unit or direction, within what is possible."""
        words = normalise(text)
        if not words or doubtful(words):
            return None
        found = mentions(words, self._readings)
        if any(m.stance != "affirmed" for m in found):
            return None
        value = only(_signed(m.key, m.number) for m in found) if found else self._whole(words)
        if value is None or bounded(words):
            return None
        return value if self.low <= float(value) <= self.high else None

    def _whole(self, words: str) -> str | None:
        lead = f"{self.lead}|{LEADING}|{IN_PICTURE}"
        # a word of both lists is read in one way, else "the the the ..." has as many readings as 2 ** words
        found = ((sign, re.fullmatch(rf"(?>(?:{lead}) )*{pattern}", words)) for sign, pattern in self._short)
        return only(_signed(sign, match.group(1) if match.re.groups else None) for sign, match in found if match)

    @cached_property
    def _grid(self) -> list[float]:
        return [float(option.value) for option in self.options]

    @cached_property
    def _readings(self) -> list[tuple[str, str]]:
        return [(str(sign), pattern.replace("N", _NUMBER)) for sign, pattern in self.readings]

    @cached_property
    def _short(self) -> list[tuple[str, str]]:
        return [(str(sign), pattern.replace("N", _NUMBER)) for sign, pattern in self.short]


def _signed(sign: str, number: str | None) -> str:
    return str(number_text(int(sign) * float(number or 0)))


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
class Several(Item):
    """A set of `things`; canonical as their values in alphabetical order, `a;b`, or `none`. `source` gives the values
    of a row. `around` is a pattern of words that may stand around the things in an answer; any other word makes it
    unreadable, since it may name something that is not known here."""

    things: tuple[Thing, ...]
    source: Callable[[Row], Iterable[str] | None]
    around: str
    form: Form = "several"

    def reply(self, row: Row, label: str) -> str:
        """The things in words: "hair, nose and mouth"."""
        texts = [thing.text for thing in self.things if thing.value in label.split(";")]
        return listed(texts) if texts else NONE

    def label(self, row: Row) -> str | None:
        """The row's set."""
        found = self.source(row)
        return None if found is None else self._text(found)

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


@dataclass(frozen=True, kw_only=True)
class Open(Item):
    """An open question, answered in free text and judged by what the text states: `labels` gives the canonical facts
    of a row of `faces`, `says` the words of its true answer, `reads` the facts that a text states; None for none."""

    labels: Callable[[Row], str | None]
    says: Callable[[Row], str]
    reads: Callable[[str], str | None]
    form: Form = "open"

    def reply(self, row: Row, label: str) -> str:
        """The words of the row's true answer."""
        return self.says(row)

    def label(self, row: Row) -> str | None:
        """The facts of the row's true answer."""
        return self.labels(row)

    def parse(self, text: str) -> str | None:
        """The facts that a text states."""
        return self.reads(text)
