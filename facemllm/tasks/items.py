"""The forms an item can take: one of several, yes or no, a number on a grid. Each is data plus a strict reader."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from facemllm.records import mapping
from facemllm.tasks.base import Form, Option, Row
from facemllm.tasks.language import Mention, bounded, doubtful, mentions, normalise, only

_NOTHING = ""  # key of mentions that name no option, as "beard" alone


def attribute(row: Row, name: str) -> bool | None:
    """An attribute of a row of `faces`; None is unknown."""
    stored = row.get("attributes")
    return (stored if isinstance(stored, Mapping) else mapping(stored)).get(name)


def number_text(value: float | None) -> str | None:
    """A number as canonical text: 37.4 for the float32 nearest to it, 35 for 35.0; None if it is none."""
    if value is None or not math.isfinite(value):
        return None
    return f"{round(value, 4) + 0.0:.6g}"


def exactly_one(names: tuple[str, ...]) -> Callable[[Row], str | None]:
    """Label of a group of exclusive attributes: known only if all members are known and one of them is true."""

    def label(row: Row) -> str | None:
        stored = row.get("attributes")
        known = stored if isinstance(stored, Mapping) else mapping(stored)
        values = [known.get(name) for name in names]
        if None in values or sum(map(bool, values)) != 1:
            return None
        return names[values.index(True)]

    return label


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several exclusive options.

    `patterns` are regular expressions that name an option anywhere in an answer; `words` are short names that count
    only as the whole answer ("Brown."), and next to a mention they contradict it ("brown and gray hair").
    `absent` is the option that a caption keeps silent about, affirmed by denying one of `absence` ("no glasses").
    """

    name: str
    templates: tuple[str, ...]
    options: tuple[Option, ...]
    source: Callable[[Row], str | None]
    patterns: Mapping[str, tuple[str, ...]]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absent: str | None = None
    absence: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    claim: str = "{} can be seen"
    hidden: Callable[[Row], bool] | None = None
    form: Form = "choice"

    @cached_property
    def claims(self) -> Mapping[str, str]:
        """A claim an option."""
        return {option.value: self.claim.format(option.text) for option in self.options}

    def reply(self, row: Row, label: str) -> str:
        """The option's text."""
        return self._by_value[label].text

    def label(self, row: Row) -> str | None:
        """The source's value if it is one of the options."""
        value = self.source(row)
        return value if value in self._by_value else None

    def option_for(self, label: str) -> Option:
        """The option of that value."""
        return self._by_value[label]

    def mention(self, label: str) -> str | None:
        """The option's text, unless it says that something is absent."""
        return None if label == self.absent else self._by_value[label].text

    def parse(self, text: str) -> str | None:
        """The one option that the text plainly names."""
        words = normalise(text)
        if not words or doubtful(words):
            return None
        if words in self._exact:
            return self._exact[words]
        found = mentions(words, self._patterns)
        if any(m.stance == "unclear" for m in found):
            return None
        named = [m.key for m in found if m.key and m.stance == "affirmed"]
        named += [self.absent for m in found if m.key == _NOTHING and m.stance == "denied" and self.absent]
        denied = {m.key for m in found if m.key and m.stance == "denied"}
        answer = only(named)
        return None if answer in denied or (answer and self._contradicted(words, answer)) else answer

    def _contradicted(self, words: str, answer: str) -> bool:
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
    def _by_value(self) -> dict[str, Option]:
        return {option.value: option for option in self.options}

    @cached_property
    def _exact(self) -> dict[str, str]:
        exact = {word: value for value, names in self.words.items() for word in names}
        for option in self.options:
            exact |= {str(normalise(text)): option.value for text in (option.value, option.text)}
        return exact

    @cached_property
    def _patterns(self) -> list[tuple[str, str]]:
        named = [(value, p) for value, patterns in self.patterns.items() for p in patterns]
        return named + [(_NOTHING, word) for word in self.absence]


_WORD = re.compile(r"(yes|yeah|yep|true|correct)|no|nope|false|incorrect")
_TAG = re.compile(
    r"(?:(?:yes|(no)) )?(?:he|she|it|they|there|this person|the person|the (?:wo)?man)"
    r" (?:is|are|has|have|does|do|wears)( not)?"
)


@dataclass(frozen=True, kw_only=True)
class Boolean:
    """A thing that is there or not. `text` mentions it in a caption; `nouns` are patterns that name it."""

    name: str
    templates: tuple[str, ...]
    text: str
    nouns: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    claim: str = "{} can be seen"
    hidden: Callable[[Row], bool] | None = None
    form: Form = "boolean"
    options: tuple[Option, ...] = (Option(value="yes", text="yes"), Option(value="no", text="no"))

    @cached_property
    def claims(self) -> Mapping[str, str]:
        """That the thing is there."""
        return {"yes": self.claim.format(self.text)}

    def reply(self, row: Row, label: str) -> str:
        """yes or no."""
        return label

    def label(self, row: Row) -> str | None:
        """yes or no as the attribute is true or false."""
        value = attribute(row, self.name)
        return None if value is None else "yes" if value else "no"

    def option_for(self, label: str) -> Option:
        """The option of that value."""
        return self.options[("yes", "no").index(label)]

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
        found = mentions(words, [(self.name, noun) for noun in self.nouns])
        if any(m.stance == "unclear" for m in found):
            return None
        return only(answers + ["yes" if m.stance == "affirmed" else "no" for m in found])


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number answered on a grid, `options` in rising order.

    `readings` are (sign, pattern) that state it anywhere in an answer, `N` standing for the number; without `N` the
    pattern states zero. `short` are such pairs that count only as the whole answer, `lead` words aside.
    """

    name: str
    templates: tuple[str, ...]
    options: tuple[Option, ...]
    column: str
    low: float
    high: float
    readings: tuple[tuple[int, str], ...]
    short: tuple[tuple[int, str], ...]
    lead: str
    unseen: tuple[str, ...] = ()
    hidden: Callable[[Row], bool] | None = None
    form: Form = "number"

    @property
    def claims(self) -> Mapping[str, str]:
        """None: how near is near enough would be anybody's guess."""
        return {}

    def reply(self, row: Row, label: str) -> str:
        """The nearest option's text."""
        return self.option_for(label).text

    def label(self, row: Row) -> str | None:
        """The exact number as text."""
        return number_text(row.get(self.column))

    def option_for(self, label: str) -> Option:
        """The nearest option, the smaller of two."""
        value, grid = float(label), self._grid
        above = min(bisect_left(grid, value), len(grid) - 1)
        below = max(above - 1, 0)
        return self.options[below if value - grid[below] <= grid[above] - value else above]

    def mention(self, label: str) -> str | None:
        """The nearest option's text."""
        return self.option_for(label).text

    def parse(self, text: str) -> str | None:
        """The one number plainly stated, with its unit or direction, within what is possible."""
        words = normalise(text)
        if not words or doubtful(words):
            return None
        found = mentions(words, self._readings)
        if any(m.stance != "affirmed" for m in found):
            return None
        value = only(_signed(m) for m in found) if found else self._whole(words)
        if value is None or bounded(words):
            return None
        return value if self.low <= float(value) <= self.high else None

    def _whole(self, words: str) -> str | None:
        values = set()
        for sign, pattern in self._short:
            if found := re.fullmatch(rf"(?:(?:{self.lead}) )*{pattern}", words):
                values.add(_signed(Mention(str(sign), found.group(1) if found.re.groups else None, "affirmed")))
        return only(values)

    @cached_property
    def _grid(self) -> list[float]:
        return [float(option.value) for option in self.options]

    @cached_property
    def _readings(self) -> list[tuple[str, str]]:
        return [(str(sign), pattern.replace("N", _NUMBER)) for sign, pattern in self.readings]

    @cached_property
    def _short(self) -> list[tuple[int, str]]:
        return [(sign, pattern.replace("N", _NUMBER)) for sign, pattern in self.short]


_NUMBER = r"(?:(?:about|around|roughly|approximately|by) )*([+-]?\d{1,3}(?:\.\d+)?)"


def _signed(mention: Mention) -> str:
    return str(number_text(int(mention.key) * float(mention.number or 0)))
