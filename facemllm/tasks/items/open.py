"""An open question: answered in free text, judged by what the text states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from facemllm.tasks.base import Form, Option, Row


@dataclass(frozen=True, kw_only=True)
class Open:
    """`labels` gives the canonical facts of a row of `faces`, `says` the words of its true answer, `reads` the facts
    that a text states; each None where there are none."""

    name: str
    templates: tuple[str, ...]
    labels: Callable[[Row], str | None]
    says: Callable[[Row], str]
    reads: Callable[[str], str | None]
    unseen: tuple[str, ...] = ()
    hidden: Callable[[Row], bool] | None = None
    form: Form = "open"
    options: tuple[Option, ...] = ()

    @property
    def claims(self) -> Mapping[str, str]:
        """None."""
        return {}

    def reply(self, row: Row, label: str) -> str:
        """The words of the row's true answer."""
        return self.says(row)

    def label(self, row: Row) -> str | None:
        """The facts of the row's true answer."""
        return self.labels(row)

    def option_for(self, label: str) -> Option:
        """An open question has no options. Raises ValueError."""
        raise ValueError(f"{self.name} is an open question: it has no options")

    def mention(self, label: str) -> str | None:
        """A caption does not mention it."""
        return None

    def parse(self, text: str) -> str | None:
        """The facts that a text states."""
        return self.reads(text)
