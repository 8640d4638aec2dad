"""Fields of JSON from a stranger: one that is missing or of another kind is left out, never an error; numbers are
finite, words are bounded and of visible characters, lists are cut.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from facemllm.report.web import plain

MOST = 200
"""Rows of a list that are shown."""
Object = Mapping[str, Any]
_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(value: object) -> bool:
    """Whether this is the hex SHA-256 of something."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def said(value: object) -> str:
    """Any value of JSON in words: names and values of an object, items of a list."""
    if isinstance(value, dict):
        return ", ".join(f"{plain(name)} {said(below)}" for name, below in list(value.items())[:MOST])
    if isinstance(value, list):
        return ", ".join(said(one) for one in value[:MOST])
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return (
            f"{value:,}" if abs(value) < 10**15 else f"{float(value):.4g}" if abs(value) < 10**300 else "a huge number"
        )
    return plain(value)


def mapping(source: Object, name: str) -> dict[str, Any]:
    """An object under a name; an empty one where there is none."""
    value = source.get(name)
    return value if isinstance(value, dict) else {}


def mappings(value: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in an object, by name."""
    found = value.items() if isinstance(value, dict) else ()
    return ((plain(name), entry) for name, entry in list(found)[:MOST] if isinstance(entry, dict))


def rows(value: object) -> list[dict[str, Any]]:
    """The objects in a list."""
    return [row for row in value[:MOST] if isinstance(row, dict)] if isinstance(value, list) else []


def pairs(value: object) -> tuple[tuple[str, str], ...]:
    """Names and values of an object in words, without those that say nothing."""
    found = value.items() if isinstance(value, dict) else ()
    return tuple((plain(name), said(one)) for name, one in list(found)[:MOST] if one is not None)


def text(source: Object, name: str) -> str:
    """A text, or a whole number as text; empty where there is none."""
    value = source.get(name)
    return plain(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
