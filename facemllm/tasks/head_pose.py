"""Head pose in degrees, answered in steps of five, with the signs of 300W-LP.

yaw > 0: the nose points to the image's left. pitch > 0: it points up. roll > 0: the head leans clockwise in the
image. `left` and `right` stay words of their own, so that a mirrored picture only swaps them. A side named after the
person ("to her left") is refused: it may mean the other one. So is a bare number other than zero: no question says
which side its sign means.
"""

from facemllm.tasks.base import Option, Task, column
from facemllm.tasks.items import Number
from facemllm.tasks.wordings import kept

TO = r"(?:(?:to|towards?) )?(?:the )?"
_DEGREES = r"N(?: degrees?)?"
_END = r"(?! and [+-]?\d)(?! of\b| or\b)"
_LEAD = "the|head|is|it|he|she|yaw|pitch|roll|angle|of|:|are|person|face|estimated?|approximate|to|be|at"


def _grid(above: str, below: str, zero: str, limit: int) -> tuple[Option, ...]:
    return tuple(
        Option(value=str(n), text=zero if n == 0 else (above if n > 0 else below).format(abs(n)))
        for n in range(-limit, limit + 1, 5)
    )


def _sides(verbs: str, above: str, below: str, zero: str) -> tuple[tuple[int, str], ...]:
    """Patterns "turned 25 degrees to the left" and "turned to the left by 25 degrees", of either side, and of zero."""
    found = []
    for sign, words in ((1, above), (-1, below)):
        found.append((sign, rf"(?:{verbs}) {_DEGREES} {TO}(?:{words}){_END}"))
        found.append((sign, rf"(?:{verbs}) {TO}(?:{words}) {_DEGREES}"))
    return (*found, (1, zero))


def _short(above: str, below: str) -> tuple[tuple[int, str], ...]:
    found = [(1, r"([+-]?0(?:\.0+)?)(?: degrees)?")]
    for sign, words in ((1, above), (-1, below)):
        found += [(sign, rf"{_DEGREES} {TO}(?:{words})"), (sign, rf"{TO}(?:{words}) {_DEGREES}")]
    return tuple(found)


_LEFT, _RIGHT = "left", "right"
_UP, _DOWN = "up|upwards?", "down|downwards?"
_CLOCKWISE, _COUNTER = "right|clockwise", "left|counter ?clockwise|anti ?clockwise"

TASK = Task(
    name="head_pose",
    metric="mae",
    unit="degrees",
    items=(
        Number(
            name="yaw",
            templates=("How far is the head turned left or right?", "Which way does the head turn, how far?"),
            unseen=(
                "How far does the head turn left or right?",
                "Left or right, how far is the head turned?",
                *kept("yaw"),
            ),
            options=_grid("turned {} degrees left", "turned {} degrees right", "facing straight ahead", 60),
            source=column("yaw"),
            low=-90,
            high=90,
            readings=_sides(
                "turned|rotated|facing|looking|pointing",
                _LEFT,
                _RIGHT,
                "(?:facing |looking )?straight ahead|facing forwards?|frontal",
            ),
            short=_short(_LEFT, _RIGHT),
            lead=_LEAD,
            center="mean",
        ),
        Number(
            name="pitch",
            templates=("How far is the head raised or lowered?", "Which way does the head nod, how far?"),
            unseen=("How far does the head nod?", "Raised or lowered, how far is the head?", *kept("pitch")),
            options=_grid("raised {} degrees", "lowered {} degrees", "level", 25),
            source=column("pitch"),
            low=-90,
            high=90,
            readings=(
                (1, rf"raised {_DEGREES}{_END}"),
                (-1, rf"lowered {_DEGREES}{_END}"),
                *_sides("turned|tilted|facing|looking|pointing|pitched", _UP, _DOWN, "(?<!eye )level"),
            ),
            short=_short(_UP, _DOWN),
            lead=_LEAD,
            center="mean",
        ),
        Number(
            name="roll",
            templates=("How far does the head lean sideways?", "Which way is the head tilted, how far?"),
            unseen=("How far is the head tilted?", "Which way does the head lean, how far?", *kept("roll")),
            options=_grid("tilted {} degrees right", "tilted {} degrees left", "upright", 20),
            source=column("roll"),
            low=-180,
            high=180,
            readings=_sides("tilted|leaning|leans|rolled", _CLOCKWISE, _COUNTER, "upright"),
            short=_short(_CLOCKWISE, _COUNTER),
            lead=_LEAD,
            center="mean",
        ),
    ),
    use="which way the head is turned",
)
