"""Head pose in bins of ten degrees from -100 to 100, as FaceXBench asks for it, with the signs of `head_pose`.

A bin holds its lower end: 10 degrees are in the bin of 10 to 20.
"""

from functools import partial

from facemllm.tasks.base import Option, Row, Task
from facemllm.tasks.head_pose import TO
from facemllm.tasks.items import Choice

WIDTH, LIMIT = 10, 100
_LOWS = tuple(range(-LIMIT, LIMIT, WIDTH))


def _value(low: int) -> str:
    return f"{low}_{low + WIDTH}"


def _bin(column: str, row: Row) -> str | None:
    angle = row.get(column)
    return None if angle is None or not -LIMIT <= angle < LIMIT else _value(int(angle // WIDTH) * WIDTH)


def _sizes(low: int) -> tuple[int, int]:
    """The bin's ends without their sign, the nearer to zero first."""
    near, far = sorted((abs(low), abs(low + WIDTH)))
    return near, far


def _patterns(low: int, verbs: str, side: str) -> tuple[str, ...]:
    near, far = _sizes(low)
    ends = f"{near}(?: degrees)?(?: to| and| -)? {far} degrees"
    return (
        rf"(?:(?:{verbs}) )?(?:between |from |by )*{ends} {TO}(?:{side})",
        rf"(?:{verbs}) {TO}(?:{side}) (?:by |between |from )*{ends}",
    )


def _axis(name: str, questions: tuple[str, str], unseen: str, above: str, below: str, verbs: tuple[str, ...]) -> Choice:
    """One angle; `above` and `below` say its bins, with {} for the degrees; `verbs` are patterns of verb and side."""
    verb_above, side_above, verb_below, side_below = verbs
    texts = {low: (above if low >= 0 else below).format("{} to {} degrees".format(*_sizes(low))) for low in _LOWS}
    return Choice(
        name=f"{name}_bin",
        templates=questions,
        unseen=(unseen,),
        options=tuple(Option(value=_value(low), text=text) for low, text in texts.items()),
        source=partial(_bin, name),
        patterns={
            _value(low): (text, *_patterns(low, *((verb_above, side_above) if low >= 0 else (verb_below, side_below))))
            for low, text in texts.items()
        },
        claim="the head is {}",
    )


TASK = Task(
    name="head_pose_bins",
    metric="accuracy",
    items=(
        _axis(
            "yaw",
            ("In which range is the head's yaw?", "Between how many degrees is the head turned?"),
            "What range of degrees is the head turned?",
            "turned {} left",
            "turned {} right",
            ("turned|rotated|facing", "left", "turned|rotated|facing", "right"),
        ),
        _axis(
            "pitch",
            ("In which range is the head's pitch?", "Between how many degrees is the head raised or lowered?"),
            "What range of degrees is the head raised or lowered?",
            "raised {}",
            "lowered {}",
            ("raised|tilted|turned", "up|upwards?", "lowered|tilted|turned", "down|downwards?"),
        ),
        _axis(
            "roll",
            ("In which range is the head's roll?", "Between how many degrees does the head lean?"),
            "What range of degrees does the head lean?",
            "tilted {} right",
            "tilted {} left",
            ("tilted|leaning", "right|clockwise", "tilted|leaning", "left|counter ?clockwise"),
        ),
    ),
    use="which way the head is turned",
)
