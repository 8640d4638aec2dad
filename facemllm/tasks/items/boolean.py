"""A thing that is there or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from facemllm.tasks.base import Form, Option, Row
from facemllm.tasks.items.labels import attribute
from facemllm.tasks.language import doubtful, mentions, normalise, only

_WORD = re.compile(r"(?:the answer is )?(?:(yes|yeah|yep|true|correct)|no|nope|false|incorrect)")
_TAG = re.compile(
    r"(?:(?:yes|(no)) )?(?:he|she|it|they|there|this person|the person|the (?:wo)?man)"
    r" (?:is|are|has|have|does|do|wears)( not)?"
)


@dataclass(frozen=True, kw_only=True)
class Boolean:
    """A thing that is there or not. `text` mentions it in a caption; `nouns` are patterns that name it.

    `source` tells from a row whether it is there; without one, the attribute of the item's name does.
    """

    name: str
    templates: tuple[str, ...]
    text: str
    nouns: tuple[str, ...]
    source: Callable[[Row], bool | None] | None = None
    unseen: tuple[str, ...] = ()
    claim: str = "{} can be seen"
    denial: str = "{} cannot be seen"
    hidden: Callable[[Row], bool] | None = None
    form: Form = "boolean"
    options: tuple[Option, ...] = (Option(value="yes", text="yes"), Option(value="no", text="no"))

    @cached_property
    def claims(self) -> Mapping[str, str]:
        """That the thing is there, and that it is not."""
        return {"yes": self.claim.format(self.text), "no": self.denial.format(self.text)}

    def reply(self, row: Row, label: str) -> str:
        """yes or no."""
        return label

    def label(self, row: Row) -> str | None:
        """yes or no as it is there or not."""
        value = attribute(row, self.name) if self.source is None else self.source(row)
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
