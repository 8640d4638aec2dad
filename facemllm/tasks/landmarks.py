"""Where parts of the face lie in the picture, in words: upper left to lower right, from 5 or 68 landmarks.

Five points are the eyes, the tip of the nose and the corners of the mouth (`records.FACES`); 68 are those of iBUG's
300-W. Sides are those of the picture: of two points the left one is that which lies further left, whatever the source
calls it, so that a mirrored picture only swaps the words.
"""

from collections.abc import Sequence
from functools import partial

from facemllm.tasks.base import Option, Row, Task
from facemllm.tasks.items import Choice

Point = tuple[float, float]

_PARTS: dict[int, dict[str, tuple[range, ...]]] = {
    5: {"eye": (range(0, 1), range(1, 2)), "nose": (range(2, 3),), "mouth": (range(3, 5),)},
    68: {
        "eye": (range(36, 42), range(42, 48)),
        "eyebrow": (range(17, 22), range(22, 27)),
        "nose": (range(30, 31),),
        "mouth": (range(48, 60),),
        "chin": (range(8, 9),),
    },
}
"""Number of landmarks -> part -> the points whose mean it is; two sets for a part that is there twice."""
APART = 0.02
"""Two eyes or brows that lie less than this share of the width apart have no left and right."""

_ROWS = {"upper": "upper|top", "middle": "middle|center|centre", "lower": "lower|bottom"}
_COLUMNS = {"left": "left", "center": "center|centre|middle", "right": "right"}
_BESIDE = "(?:left|right|above|below|under|over|off|near|around)(?: of| from)?(?: the)? (?:center|centre)"
_END = "(?: (?:part|third|area|region|side|corner|portion|quadrant|section))?"


def _text(row: str, column: str) -> str:
    return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


def _patterns(row: str, column: str) -> tuple[str, ...]:
    named = rf"(?:{_ROWS[row]}) (?:{_COLUMNS[column]}){_END}"
    if (row, column) == ("middle", "center"):
        return (named, f"(?:center|centre|exact middle){_END}")
    return (named, rf"(?:{_COLUMNS[column]}) (?:{_ROWS[row]}){_END}") if row == "middle" else (named,)


REGIONS = {f"{row}_{column}": _text(row, column) for row in _ROWS for column in _COLUMNS}


def _region(part: str, side: str | None, row: Row) -> str | None:
    point = _point(row, part, side)
    width, height = row.get("width"), row.get("height")
    if point is None or not width or not height:
        return None
    x, y = point[0] / width, point[1] / height
    if not (0 <= x < 1 and 0 <= y < 1):
        return None
    return f"{tuple(_ROWS)[int(y * 3)]}_{tuple(_COLUMNS)[int(x * 3)]}"


def _point(row: Row, part: str, side: str | None) -> Point | None:
    points = row.get("landmarks")
    sets = () if points is None else _PARTS.get(len(points), {}).get(part, ())
    if not sets:
        return None
    found = sorted(_mean([points[index] for index in indices]) for indices in sets)  # type: ignore[index]
    if side is None:
        return found[0]
    if len(found) != 2 or not found[1][0] - found[0][0] >= APART * (row.get("width") or 0):
        return None
    return found[0] if side == "left" else found[1]


def _mean(points: Sequence[Sequence[float]]) -> Point:
    return sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)


def _item(part: str, side: str | None) -> Choice:
    named = f"{side} {part}" if side else part
    place = f"{part} on the {side} of the picture" if side else part
    return Choice(
        name=f"{named.replace(' ', '_')}_region",
        templates=(f"In which region of the picture is the {named}?", f"Where in the picture is the {place}?"),
        unseen=(f"Which part of the picture has the {named} in it?",),
        options=tuple(Option(value=value, text=text) for value, text in REGIONS.items()),
        source=partial(_region, part, side),
        patterns={f"{row}_{column}": _patterns(row, column) for row in _ROWS for column in _COLUMNS},
        others=(_BESIDE, r"between(?: \S+)+"),
        claim=f"the {named} is in the {{}} of the picture",
    )


TASK = Task(
    name="landmarks",
    metric="accuracy",
    items=tuple(
        _item(part, side)
        for part, sets in _PARTS[68].items()
        for side in (("left", "right") if len(sets) > 1 else (None,))
    ),
    use="where parts of the face lie in the picture",
)
