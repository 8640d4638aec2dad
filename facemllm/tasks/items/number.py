"""A number on a grid."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from facemllm.tasks.base import Form, Option, Row
from facemllm.tasks.items.labels import number_text
from facemllm.tasks.language import Mention, bounded, doubtful, mentions, normalise, only


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number answered on a grid, `options` in rising order.

    `readings` are (sign, pattern) that state it anywhere in an answer, `N` standing for the number; without `N` the
    pattern states zero. `short` are such pairs that count only as the whole answer, `lead` words aside.
    """

    name: str
    templates: tuple[str, ...]
    options: tuple[Option, ...]
    source: Callable[[Row], float | None]
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
