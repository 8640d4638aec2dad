"""Exact labels out of a row of `faces`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from facemllm.tables import mapping
from facemllm.tasks.base import Row


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


def column(name: str) -> Callable[[Row], Any]:
    """Label that stands in a column of its own."""
    return lambda row: row.get(name)
