"""Facial action units, there or not: the union of BP4D's twelve and DISFA's eight.

Where a source codes intensities 0 to 5, a unit is there from 2 up, as the field counts it (DISFA's protocol since Zhao
and others, "Deep region and multi-label learning for facial action unit detection", CVPR 2016).
"""

from collections.abc import Mapping
from functools import partial

from facemllm.tasks.base import Row, Task, known
from facemllm.tasks.items import Boolean

BP4D = (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24)
DISFA = (1, 2, 4, 6, 9, 12, 25, 26)
PRESENT_FROM = 2
INTENSITIES = ("disfa", "render")
PRESENCE = ("bp4d",)
"""Sources that code intensities, and those that code presence alone."""

NAMES: Mapping[int, tuple[str, str]] = {
    1: ("raised inner brows", "inner brow raiser|inner brows? (?:is |are )?raised|raised inner (?:eye)?brows?"),
    2: ("raised outer brows", "outer brow raiser|outer brows? (?:is |are )?raised|raised outer (?:eye)?brows?"),
    4: ("lowered brows", "brow lowerer|brows? (?:is |are )?lowered|lowered (?:eye)?brows?"),
    5: ("raised upper eyelids", "upper lid raiser|upper (?:eye)?lids? (?:is |are )?raised|raised upper (?:eye)?lids?"),
    6: ("raised cheeks", "cheek raiser|cheeks? (?:is |are )?raised|raised cheeks?"),
    7: ("tightened eyelids", "lid tightener|(?:eye)?lids? (?:is |are )?tightened|tightened (?:eye)?lids?"),
    9: ("a wrinkled nose", "nose wrinkler|nose (?:is )?wrinkled|(?:a )?wrinkled nose"),
    10: ("a raised upper lip", "upper lip raiser|upper lip (?:is )?raised|(?:a )?raised upper lip"),
    12: ("lip corners pulled up", "lip corner puller|lip corners? (?:is |are )?pulled up"),
    14: ("dimpled lip corners", "dimpler|lip corners? (?:is |are )?dimpled|dimpled lip corners?"),
    15: ("lip corners pulled down", "lip corner depressor|lip corners? (?:is |are )?(?:pulled down|depressed)"),
    17: ("a raised chin", "chin raiser|chin (?:is )?raised|(?:a )?raised chin"),
    20: ("stretched lips", "lip stretcher|lips (?:are )?stretched|stretched lips"),
    23: ("tightened lips", "lip tightener|lips (?:are )?tightened|tightened lips"),
    24: ("pressed lips", "lip pressor|lips (?:are )?pressed(?: together)?|pressed lips"),
    25: ("parted lips", "lips part|lips (?:are )?parted|parted lips"),
    26: ("a dropped jaw", "jaw drop|jaw (?:is )?dropped|(?:a )?dropped jaw"),
}
"""Unit -> its words, and patterns of its name in FACS and in words (Ekman, Friesen, Hager, 2002)."""


def coded(row: Row) -> Mapping[str, float]:
    """The action units of a row by name: intensities 0 to 5, or 0 and 1."""
    return known(row, "action_units")


def has_intensities(row: Row) -> bool:
    """Whether a row's values are intensities: its source codes them, or it is not known to and one is above 1."""
    source = row.get("source")
    if source in INTENSITIES or source in PRESENCE:
        return source in INTENSITIES
    return any(value is not None and value > 1 for value in coded(row).values())


def _present(unit: str, row: Row) -> bool | None:
    value = coded(row).get(unit)
    if value is None:
        return None
    return bool(value >= (PRESENT_FROM if has_intensities(row) else 1))


def _item(number: int) -> Boolean:
    text, pattern = NAMES[number]
    return Boolean(
        name=f"AU{number}",
        templates=(f"Does the face show {text}, action unit {number}?", f"Is action unit {number}, {text}, there?"),
        unseen=(f"Do you see action unit {number}, {text}?",),
        text=text,
        nouns=(pattern, f"au ?{number}", f"action unit {number}"),
        source=partial(_present, f"AU{number}"),
    )


TASK = Task(
    name="action_units",
    metric="f1",
    items=tuple(_item(number) for number in sorted({*BP4D, *DISFA})),
    use="movements of the face that can be seen; they tell no feeling, mood or intent",
)
