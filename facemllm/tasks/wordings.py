"""Wordings written one by one, by item: `kept_wordings.csv` for evaluation alone, whose authors had seen neither the
grammar of paraphrases nor this code; `training_wordings.csv` for training alone, whose authors had not seen those kept
for evaluation either. No training question is one that is kept, or contains it. New rows go to the end of an item's:
the place of a wording is part of stored turns."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path


def kept(item: str) -> tuple[str, ...]:
    """The wordings of an item that are kept for evaluation, in order; none if there are none."""
    return _by_item("kept_wordings.csv").get(item, ())


def written(item: str) -> tuple[str, ...]:
    """The wordings of an item for training, in order; none if there are none."""
    return _by_item("training_wordings.csv").get(item, ())


@cache
def _by_item(name: str) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    with Path(__file__).with_name(name).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["item"], []).append(row["question"])
    return {item: tuple(texts) for item, texts in found.items()}
