"""The oracle: the renderer's own labels, put into words.

It states every fact that the labels give and that is there to be seen, in the tasks' own phrases, between words of a
small closed set. Order, sentences and connectors vary with a hash of the image, so that no fact always follows another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from facemllm.annotate.annotator import Annotation
from facemllm.core import digests
from facemllm.core.digests import draw
from facemllm.tasks.caption import FACTS

WORDING = 1
"""Number of its wording, here and in the tasks' phrases: raise it with what it says. A test holds them together."""

_PERSON = ("gender", "age")
_MOOD = ("expression",)
_POSE = ("yaw", "pitch", "roll")

_GENDER_OPENINGS = ("This is", "Here is", "The person is", "The picture shows")
_AGE_OPENINGS = ("The person is", "The face is")
_LOOKS_OPENINGS = ("The person has", "The face has")
_MERGERS = (" with ", " who has ")
_MOOD_OPENINGS = ("The face looks", "The person looks", "The expression is")
_POSE_OPENINGS = ("The head is", "The face is")
_SEPARATORS = (" and ", ", and ")


@dataclass(frozen=True)
class Oracle:
    """Describes rows that carry exact labels. A row whose labels give no fact is refused."""

    name: str = "oracle"
    needs_image: bool = False
    columns: tuple[str, ...] = (
        *("image_id", "caption", "attributes", "expression", "age", "gender", "yaw", "pitch", "roll"),
    )

    @property
    def digest(self) -> str:
        """SHA-256 of what it is: not of its code, so that moving a line changes no table."""
        return digests.of_json(["oracle", WORDING])

    def annotate(self, rows: Sequence[Mapping[str, Any]]) -> list[Annotation]:
        """A caption a row; its labels are the source's already. A source's own caption needs no labels."""
        return [Annotation(caption=_described(row)) for row in rows]


def _described(row: Mapping[str, Any]) -> str | None:
    try:
        return caption(row)
    except ValueError:
        if row.get("caption"):
            return None
        raise


def caption(row: Mapping[str, Any]) -> str:
    """All that the labels of a row say is there, in words. Raises ValueError when they say nothing."""
    image_id = row["image_id"]
    phrases = {}
    for item in FACTS:
        label = item.label(row)
        if label is not None and (text := item.mention(label)) is not None:
            phrases[item.name] = text
    if not phrases:
        raise ValueError("no label that can be put into words")

    def choose(options: Sequence[str], what: str) -> str:
        return options[draw(len(options), image_id, what)]

    def ordered(names: Iterable[str]) -> list[str]:
        return sorted((n for n in names if n in phrases), key=lambda n: draw(2**32, image_id, "order", n))

    def listed(names: Iterable[str], separators: Sequence[str] = _SEPARATORS) -> str:
        *first, last = ordered(names)
        joined = ", ".join(phrases[name] for name in first)
        return (joined + choose(separators, last) if first else "") + phrases[last]

    looks = [name for name in phrases if name not in (*_PERSON, *_MOOD, *_POSE)]
    person, pose = ordered(_PERSON), ordered(_POSE)
    merged = bool(person and looks) and draw(2, image_id, "merged") == 0
    sentences = {}
    if person:
        by_gender = person[0] == "gender"
        opening = choose(_GENDER_OPENINGS if by_gender else _AGE_OPENINGS, "person")
        said = listed(_PERSON, (", ",) if by_gender else (" and ",))
        tail = choose(_MERGERS, "merger") + listed(looks) if merged else ""
        sentences["person"] = f"{opening} {said}{tail}."
    if looks and not merged:
        sentences["looks"] = f"{choose(_LOOKS_OPENINGS, 'looks')} {listed(looks)}."
    if "expression" in phrases:
        sentences["mood"] = f"{choose(_MOOD_OPENINGS, 'mood')} {phrases['expression']}."
    if pose:
        sentences["pose"] = f"{choose(_POSE_OPENINGS, 'pose')} {listed(pose)}."
    return " ".join(sentences[s] for s in sorted(sentences, key=lambda s: draw(2**32, image_id, "sentence", s)))
