"""Experts and an annotator over one row, in one pass: experts first, so that no model is paid for a row they refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from facemllm.annotate.annotator import Annotation, Annotator
from facemllm.asking.refusals import JobStopped
from facemllm.core import digests
from facemllm.tables import PAIRED


@dataclass(frozen=True)
class Chained:
    """Runs `experts`, then `main`. Of a field that both give, what `main` says counts."""

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
