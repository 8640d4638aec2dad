"""Intensity of facial action units, 0 (absent) to 5 (maximum), for sources that code it: DISFA's twelve."""

from functools import partial

from facemllm.tasks.action_units import NAMES, coded, has_intensities
from facemllm.tasks.base import Option, Row, Task
from facemllm.tasks.items import Number

UNITS = (1, 2, 4, 5, 6, 9, 12, 15, 17, 20, 25, 26)
_LEAD = r"the|intensity|level|strength|grade|is|of|:|it|about|au ?\d+|action unit \d+"


def _intensity(unit: str, row: Row) -> float | None:
    value = coded(row).get(unit)
    return value if value is not None and has_intensities(row) else None


def _item(number: int) -> Number:
    text = NAMES[number][0]
    return Number(
        name=f"AU{number}_intensity",
        templates=(
            f"How strong is action unit {number}, {text}?",
            f"Which intensity, 0 to 5, has action unit {number}, {text}?",
        ),
        unseen=(f"On a scale of 0 to 5, how strong is action unit {number}?",),
        options=tuple(Option(value=str(n), text=f"intensity {n}") for n in range(6)),
        source=partial(_intensity, f"AU{number}"),
        low=0,
        high=5,
        readings=((1, r"(?:intensity|level|grade)(?: (?:level|of|is|:))* N(?: (?:out )?of 5)?"), (1, "N out of 5")),
        short=((1, "N(?: out of 5)?"),),
        lead=_LEAD,
    )


TASK = Task(
    name="action_unit_intensity",
    metric="mae",
    unit="grades",
    items=tuple(_item(number) for number in UNITS),
    use="movements of the face that can be seen; they tell no feeling, mood or intent",
)
