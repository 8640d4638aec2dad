"""Exact labels out of a row of `faces`: from its columns, its attributes, and the parts that its segmentation shows.

A segmentation is the PNG of the 19 CelebAMask-HQ classes (`tables.schemas.SEGMENTATION`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from facemllm.tables import mapping
from facemllm.tables.schemas import SEGMENTATION
from facemllm.tasks.base import Row


def known(row: Row, column: str) -> Mapping[str, Any]:
    """A column of named values (`attributes`, `action_units`) as a mapping, whether stored as pairs or one already."""
    stored = row.get(column)
    return stored if isinstance(stored, Mapping) else mapping(stored)


def attribute(row: Row, name: str) -> bool | None:
    """An attribute of a row of `faces`; None is unknown."""
    return known(row, "attributes").get(name)


def number_text(value: float | None) -> str | None:
    """A number as canonical text: 37.4 for the float32 nearest to it, 35 for 35.0; None if it is none."""
    if value is None or not math.isfinite(value):
        return None
    return f"{round(value, 4) + 0.0:.6g}"


def exactly_one(names: tuple[str, ...]) -> Callable[[Row], str | None]:
    """Label of a group of exclusive attributes: known only if all members are known and one of them is true."""

    def label(row: Row) -> str | None:
        found = known(row, "attributes")
        values = [found.get(name) for name in names]
        if None in values or sum(map(bool, values)) != 1:
            return None
        return names[values.index(True)]

    return label


def column(name: str) -> Callable[[Row], Any]:
    """Label that stands in a column of its own."""
    return lambda row: row.get(name)


MAX_PIXELS = 2048 * 2048
FAINT = 2000
"""A part of less than one in so many of the map's pixels is neither plainly there nor plainly absent."""

Sizes = Mapping[str, float]
"""Class name -> its share of the map's pixels."""


def sizes(row: Row) -> Sizes | None:
    """Shares of the classes in a row's segmentation; None where there is none or it is no such map."""
    stored = row.get("segmentation")
    data = stored.get("bytes") if isinstance(stored, Mapping) else stored
    return _sizes(data) if data else None


@lru_cache(maxsize=4)  # all questions about a face are asked in a row
def _sizes(data: bytes) -> Sizes | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS or image.mode not in ("L", "P"):
                return None
            counts = image.histogram()
            total = image.width * image.height
    except Exception:  # damaged data can raise almost anything from a decoder
        return None
    if any(counts[len(SEGMENTATION) :]):
        return None
    return {name: count / total for name, count in zip(SEGMENTATION, counts, strict=False)}


def shown(found: Sizes, classes: tuple[str, ...]) -> bool | None:
    """Whether any of these classes is to be seen: no pixel is no; a few pixels are neither yes nor no."""
    share = sum(found[name] for name in classes)
    return True if share >= 1 / FAINT else None if share else False


def hidden_from(row: Row, *classes: str) -> bool:
    """Whether a row's segmentation says that none of these classes can be seen."""
    found = sizes(row)
    return found is not None and shown(found, classes) is False
