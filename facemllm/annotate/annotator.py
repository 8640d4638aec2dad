"""What an annotator is: something that describes rows of `faces`. A remote model, a local one, or the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

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
    """Describes rows. It travels to Ray's workers by pickling: keep it small, and load models where they are used."""

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
