"""Counts for the report, taken while the tables stream by."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tallies:
    """`attributes` by (name, value); `exclusive` pairs of attributes found on one face; `disagreements` of captions
    with labels by item, with the `first` of each as a sentence; `questions` by (task, split); `answers` to closed
    questions by (task, item, answer)."""

    attributes: Counter[tuple[str, bool]] = field(default_factory=Counter)
    exclusive: Counter[str] = field(default_factory=Counter)
    disagreements: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    questions: Counter[tuple[str, str]] = field(default_factory=Counter)
    answers: Counter[tuple[str, str, str]] = field(default_factory=Counter)
