"""What an annotator is: something that describes rows of `faces`. A remote model, a local one, the oracle, experts; or
two of them, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from facemllm.asking.requests import JobStopped
from facemllm.core import digests
from facemllm.tables import FACES, LABELS, PAIRED, pairs

FILLED = tuple(label.name for label in LABELS if label.name != "caption")
"""The labels that an annotator may fill in; a caption is a thing of its own."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What an annotator says of one row.

    `labels` are columns of `faces` to fill where the source left them empty (`attributes` and `action_units` as
    mappings, filled name by name); a source's own label is never overwritten. `cost` is in the currency of the rates.
    `by` tells of a field (`caption` or a label) where it comes from: `origin`, `model_digest`, `prompt_hash`; what it
    does not tell is taken from the annotator.
    """

    caption: str | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 0.0
    by: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)


class Annotator(Protocol):
    """Describes rows. It travels to Ray's workers by pickling: keep it small, and load models where they are used. It
    may have `gpus`, how many each task needs, and `one_machine`, whether all tasks have to be on the driver's."""

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


@dataclass(frozen=True)
class Chained:
    """`experts`, then `main`, in one pass over a row, so that no model is paid for a row that the experts refuse. Of a
    field that both give, what `main` says counts."""

    experts: Annotator
    main: Annotator

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.main.name}+{self.experts.name}"

    @property
    def digest(self) -> str:
        """SHA-256 of both digests."""
        return digests.of_json([self.experts.digest, self.main.digest])

    @property
    def columns(self) -> tuple[str, ...]:
        """What either reads."""
        return tuple(dict.fromkeys((*self.experts.columns, *self.main.columns)))

    @property
    def needs_image(self) -> bool:
        """Whether either looks at the picture."""
        return self.experts.needs_image or self.main.needs_image

    @property
    def gpus(self) -> float:
        """GPUs that a task needs."""
        return max(getattr(part, "gpus", 0.0) for part in (self.experts, self.main))

    @property
    def one_machine(self) -> bool:
        """Whether all tasks have to be on one machine."""
        return any(getattr(part, "one_machine", False) for part in (self.experts, self.main))

    def annotate(self, rows: Sequence[Mapping[str, Any]]) -> list[Annotation | Exception]:
        """What both say of each row; a row that the experts refuse is not shown to `main`."""
        merged = _answers(self.experts, list(rows))
        places = [place for place, said in enumerate(merged) if isinstance(said, Annotation)]
        for place, said in zip(places, _answers(self.main, [rows[place] for place in places]), strict=True):
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


def _answers(part: Annotator, rows: list[Mapping[str, Any]]) -> list[Annotation | Exception]:
    if not rows:
        return []
    try:
        return list(part.annotate(rows))
    except JobStopped:
        raise
    except Exception as error:
        return [error] if len(rows) == 1 else [_answers(part, [row])[0] for row in rows]
