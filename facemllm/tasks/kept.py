"""Wordings kept for evaluation that were written by people who had not seen the grammar of paraphrases, nor this code:
`kept_wordings.csv`, by item. No training question uses one, and the grammar makes none."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path


def kept(item: str) -> tuple[str, ...]:
    """The wordings kept of an item, in order; none if there are none."""
    return _by_item().get(item, ())


@cache
def _by_item() -> Mapping[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    with Path(__file__).with_name("kept_wordings.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["item"], []).append(row["question"])
    return {name: tuple(texts) for name, texts in found.items()}
