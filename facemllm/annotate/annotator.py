"""What an annotator is: something that describes rows of `faces`. A remote model, a local one, the oracle, experts; or
two of them, one after the other.

The oracle puts the renderer's own labels into words. It states every fact that the labels give and that is there to be
seen, in the tasks' own phrases, between words of a small closed set. Sentences, their order and connectors vary with a
hash of the image. What a face looks like is listed in one order, as people do: in a drawn one a model that has learnt
little says one thing again and again, since nothing but its own words tells what is left to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from facemllm.asking.requests import JobStopped
from facemllm.asking.store import Opening
from facemllm.core import digests
from facemllm.core.digests import draw
from facemllm.tables import FACES, LABELS, PAIRED, pairs
from facemllm.tasks.caption import FACTS

FILLED = tuple(label.name for label in LABELS if label.name != "caption")
"""The labels that an annotator may fill in; a caption is a thing of its own."""

WORDING = 2
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


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What an annotator says of one row. `labels` are columns of `faces` to fill where the source left them empty
    (`attributes` and `action_units` as mappings, filled name by name); a source's own label is never overwritten.
    `cost` is in the currency of the rates. `by` tells of a field (`caption` or a label) where it comes from: `origin`,
    `model_digest`, `prompt_hash`; what it does not tell is taken from the annotator."""

    caption: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 0.0
    by: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)


class Annotator(Protocol):
    """Describes rows. It travels to Ray's workers by pickling: keep it small, and load models where they are used. It
    may have `gpus`, how many each task takes where there are any, and `one_machine`, whether all tasks have to be on
    the driver's. One that keeps replies under `home` has `kept_by`: itself, with its replies kept by another."""

    @property
    def name(self) -> str:
        """Its key in the settings."""

    @property
    def digest(self) -> str:
        """SHA-256 of what decides its answers: code, weights, configuration."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of `faces` it reads, apart from the image. Nothing else travels to it."""

    @property
    def needs_image(self) -> bool:
        """Whether it looks at the picture; if not, image bytes stay where they are."""

    def annotate(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Annotation | Exception]:
        """One annotation a row, in their order, each depending on its own row alone; an exception in the place of an
        annotation refuses that row. A raised exception refuses all: the rows of the batch are then tried one by one,
        and those that fail again go to quarantine. A raised `JobStopped` ends the job."""


def checked(annotation: Annotation) -> Annotation:
    """The annotation, if it fits the `faces` table. Raises ValueError or TypeError if not: the row is then refused."""
    if annotation.caption is not None and not (isinstance(annotation.caption, str) and annotation.caption.strip()):
        raise ValueError("the caption is empty or no text")
    for column, value in annotation.labels.items():
        if column not in FILLED:
            raise ValueError(f"'{column}' is no label of the faces table")
        pa.array([pairs(value) if column in PAIRED else value], FACES.field(column).type)
    return annotation


class Chained:
    """`experts`, then `main`, in one pass over a row, so that no model is paid for a row that the experts refuse. Of a
    field that both give, what `main` says counts. It needs what either needs."""

    def __init__(self, experts: Annotator, main: Annotator) -> None:
        self.experts, self.main = experts, main
        self.name = f"{main.name}+{experts.name}"
        self.digest = digests.of_json([experts.digest, main.digest])
        self.columns = tuple(dict.fromkeys((*experts.columns, *main.columns)))
        self.needs_image = experts.needs_image or main.needs_image
        self.gpus = max(getattr(part, "gpus", 0.0) for part in (experts, main))
        self.one_machine = any(getattr(part, "one_machine", False) for part in (experts, main))
        self.home = getattr(main, "home", None)

    def kept_by(self, opening: Opening) -> Chained:
        """The same, with the replies of `main` kept there."""
        main: Any = self.main
        return Chained(self.experts, main.kept_by(opening))

    def annotate(self, rows: Sequence[Mapping[str, Any]]) -> list[Annotation | Exception]:
        """What both say of each row; a row that the experts refuse is not shown to `main`."""
        merged = answers_one_by_one(self.experts, rows)
        places = [place for place, said in enumerate(merged) if isinstance(said, Annotation)]
        shown = [rows[place] for place in places]
        for place, said in zip(places, answers_one_by_one(self.main, shown), strict=True):
            found = merged[place]
            assert isinstance(found, Annotation)
            merged[place] = said if isinstance(said, Exception) else self._merged(found, said)
        return merged

    def _merged(self, found: Annotation, said: Annotation) -> Annotation:
        labels = dict(found.labels)
        for column, value in said.labels.items():
            if column in PAIRED:
                labels[column] = {**(labels.get(column) or {}), **value}
            elif value is not None:
                labels[column] = value
        return Annotation(
            caption=found.caption if said.caption is None else said.caption,
            labels=labels,
            cost=found.cost + said.cost,
            by={
                **_by(found, {"origin": "expert", "model_digest": self.experts.digest}),
                **_by(said, {"origin": "annotator", "model_digest": self.main.digest}),
            },
        )


def _by(said: Annotation, default: Mapping[str, str | None]) -> dict[str, dict[str, str | None]]:
    fields = [column for column, value in said.labels.items() if value is not None]
    fields += [] if said.caption is None else ["caption"]
    return {field: {**default, **said.by.get(field, {})} for field in fields}


def answers_one_by_one(annotator: Annotator, rows: Sequence[Mapping[str, Any]]) -> list[Annotation | Exception]:
    """What an annotator says of some rows; where that fails, of each row alone. Raises JobStopped as it does."""
    if not rows:
        return []
    try:
        said = list(annotator.annotate(rows))
        if len(said) != len(rows):
            raise ValueError(f"{annotator.name} gave {len(said)} replies for {len(rows)} rows")
    except JobStopped:
        raise
    except Exception as error:
        return [error] if len(rows) == 1 else [answers_one_by_one(annotator, [row])[0] for row in rows]
    return said


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

    def listed(names: Sequence[str], separators: Sequence[str] = _SEPARATORS) -> str:
        *first, last = names
        joined = ", ".join(phrases[name] for name in first)
        return (joined + choose(separators, last) if first else "") + phrases[last]

    looks = [name for name in phrases if name not in (*_PERSON, *_MOOD, *_POSE)]
    person, pose = ordered(_PERSON), ordered(_POSE)
    merged = bool(person and looks) and draw(2, image_id, "merged") == 0
    sentences = {}
    if person:
        by_gender = person[0] == "gender"
        opening = choose(_GENDER_OPENINGS if by_gender else _AGE_OPENINGS, "person")
        said = listed(person, (", ",) if by_gender else (" and ",))
        tail = choose(_MERGERS, "merger") + listed(looks) if merged else ""
        sentences["person"] = f"{opening} {said}{tail}."
    if looks and not merged:
        sentences["looks"] = f"{choose(_LOOKS_OPENINGS, 'looks')} {listed(looks)}."
    if "expression" in phrases:
        sentences["mood"] = f"{choose(_MOOD_OPENINGS, 'mood')} {phrases['expression']}."
    if pose:
        sentences["pose"] = f"{choose(_POSE_OPENINGS, 'pose')} {listed(pose)}."
    return " ".join(sentences[s] for s in sorted(sentences, key=lambda s: draw(2**32, image_id, "sentence", s)))
