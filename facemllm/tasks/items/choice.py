"""One of several exclusive options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from facemllm.tasks.base import Form, Option, Row
from facemllm.tasks.language import doubtful, mentions, normalise, only

_NOTHING = ""  # key of mentions that name no option, as "beard" alone
_OTHER = "other"  # key of mentions of something else
_LEAD = re.compile(r"^(?:(?:the )?(?:answer|colou?r|style|it|they) (?:is|are|:) )+")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several exclusive options.

    `patterns` are regular expressions that name an option anywhere in an answer; `words` are short names that count
    only as the whole answer ("Brown."), and next to a mention they contradict it ("brown and gray hair").
    `absent` is the option that a caption keeps silent about, affirmed by denying one of `absence` ("no glasses").
    `others` are patterns of longer phrases that name none of the options ("left of center").
    """

    name: str
    templates: tuple[str, ...]
    options: tuple[Option, ...]
    source: Callable[[Row], str | None]
    patterns: Mapping[str, tuple[str, ...]]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absent: str | None = None
    absence: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
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
        if (whole := _LEAD.sub("", words)) in self._exact:
            return self._exact[whole]
        found = [m for m in mentions(words, self._patterns) if m.key != _OTHER]
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
        return [*named, *((_NOTHING, word) for word in self.absence), *((_OTHER, words) for words in self.others)]
