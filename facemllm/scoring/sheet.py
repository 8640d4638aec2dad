"""The questions of a split with their true answers, and a model's answers to them.

Truth comes from the conversations, never from a predictions file, and every question of the split must be answered
once. Tables are read in batches of columns; a question keeps its id, a few numbers and a reference to its answer.
Legend: N questions, F faces (images).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.scoring import metrics
from facemllm.scoring.metrics import Array, Parsed, number
from facemllm.tables import Table, mapping
from facemllm.tasks.answers import refuses
from facemllm.tasks.asking import NATIVE

Key = tuple[str, str]
"""Task and item."""
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

KINDS = ("gender", "age_band", "skin_tone")
BETWEEN = " x "
_BATCH = 16384  # predictions at a time
_FACES = 2048  # conversations at a time


@dataclass(frozen=True)
class Variant:
    """How an item is asked beside its own form; `claim` is what a statement claims."""

    task: str
    item: str
    variant: str
    claim: str | None


@dataclass(frozen=True)
class Sheet:
    """The questions of a split, in table order; `sample_ids`, `faces` and `answers` have one entry a question.

    `faces` holds positions in `images`, `people` the subject of each image as a number from 0 (without one: a person of
    its own), `rows` the positions of each item's questions in its own form, `variants` those of the same items asked
    otherwise, `questions` how each is asked, `groups` by kind the group of each image, None where it is unknown.
    """

    split: str
    sample_ids: pa.Array
    images: Sequence[str]
    faces: npt.NDArray[np.int32]
    people: Rows
    answers: Sequence[str]
    rows: Mapping[Key, Rows]
    variants: Mapping[Variant, Rows]
    questions: Mapping[Key, Any]
    groups: Mapping[str, Sequence[str | None]]

    @cached_property
    def subjects(self) -> Rows:
        """The subject of each question."""
        return self.people[self.faces]

    @cached_property
    def people_count(self) -> int:
        """Number of subjects."""
        return int(self.people.max()) + 1 if len(self.people) else 0

    @property
    def kinds(self) -> list[tuple[str, ...]]:
        """Kinds of groups that occur, alone and in pairs (`gender x age_band`)."""
        found = [kind for kind in KINDS if any(self.groups.get(kind, ()))]
        return [(kind,) for kind in found] + list(combinations(found, 2))

    @property
    def outright(self) -> dict[Variant, Rows]:
        """Positions of each item's questions in its own form, as `variants` holds those of the others."""
        return {Variant(*key, NATIVE, None): rows for key, rows in self.rows.items()}

    @property
    def asked(self) -> dict[Variant, Rows]:
        """Positions of the questions of every item and way."""
        return {**self.outright, **self.variants}

    def of_task(self, task: str) -> Rows:
        """Positions of a task's questions in their own form."""
        return np.sort(np.concatenate([rows for (owner, _), rows in self.rows.items() if owner == task]))

    def said(self, key: Key, parsed: Parsed) -> list[str | None]:
        """An answer to an item in its own form by image; None where it was not asked, or not read."""
        found: list[str | None] = [None] * len(self.images)
        for row in self.rows.get(key, ()):
            found[self.faces[row]] = parsed[row]
        return found


@dataclass(frozen=True)
class Answers:
    """A model's answers in the order of the sheet: as read (None: unreadable), whether an unreadable one is a refusal,
    the probability given to the answer (NaN where there is none), and the likeliest option, whatever was written (None
    where options have no probabilities)."""

    parsed: Parsed
    refused: npt.NDArray[np.bool_]
    confidence: Array
    likeliest: Parsed = ()

    @classmethod
    def of(cls, parsed: Parsed) -> Answers:
        """Answers of which no more is known than what was read."""
        return cls(parsed, np.zeros(len(parsed), dtype=bool), np.full(len(parsed), np.nan), [None] * len(parsed))


def is_asked(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is evaluated: it stands alone and its answer is known."""
    return not turn["follows"] and turn["answer"] is not None


def read_sheet(conversations: Table, split: str) -> Sheet:
    """Read the questions of a split and their answers. Raises UserError when there are none, or a number is none. Turns
    that follow from earlier ones are left out: asked alone they have no meaning."""
    reading = _Reading()
    for batch in conversations.batches(["image_id", "subject_id", "groups", "turns"], split, _FACES):
        reading.add(batch)
    if not reading.answers:
        raise UserError(f"{conversations.path} has no questions in split '{split}'; choose another evaluate.split")
    sheet = reading.sheet(split)
    if pc.count_distinct(sheet.sample_ids).as_py() < len(sheet.sample_ids):
        raise UserError(f"{conversations.path}: two questions of split '{split}' share a sample_id; reformat again")
    for (task, _), rows in sheet.rows.items():
        numeric = metrics.of(tasks.get(task)).answers == "number"
        if numeric and (odd := [row for row in rows if number(sheet.answers[row]) is None]):
            raise UserError(
                f"{conversations.path}: the answer '{sheet.answers[odd[0]]}' to question "
                f"{sheet.sample_ids[int(odd[0])].as_py()} of {task} is no number; mend the labels and reformat again"
            )
    return sheet


class _Reading:
    """A sheet in the making."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self._words: dict[str, str] = {}  # an answer is kept once
        self._ids: list[pa.Array] = []
        self._faces: list[npt.NDArray[np.int32]] = []
        self._images: dict[str, int] = {}
        self._people: dict[str, int] = {}
        self._owners: list[int] = []
        self._groups: dict[str, list[str | None]] = {kind: [] for kind in KINDS}
        self._numbers: dict[str, int] = {}  # task and template -> place in `asked`
        self._asked: list[Variant] = []
        self._which: list[npt.NDArray[np.int32]] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Take in a batch of conversations."""
        faces = self._add_faces(batch.select(["image_id", "subject_id", "groups"]).to_pylist())
        lists = batch.column("turns")
        turns, owners = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
        follows = pc.fill_null(pc.struct_field(turns, "follows"), False)
        kept = pc.and_(pc.invert(follows), pc.is_valid(pc.struct_field(turns, "answer")))
        turns, owners = turns.filter(kept), owners[kept.to_numpy(zero_copy_only=False)]
        self._which.append(self._add_questions(turns))
        self._faces.append(faces[owners])
        self._ids.append(pc.struct_field(turns, "sample_id"))
        said = pc.struct_field(turns, "answer").to_pylist()
        self.answers += [self._words.setdefault(text, text) for text in said]

    def _add_faces(self, faces: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.int32]:
        for face in faces:
            if face["image_id"] not in self._images:
                self._images[face["image_id"]] = len(self._images)
                subject = face["subject_id"] or f"image {face['image_id']}"
                self._owners.append(self._people.setdefault(subject, len(self._people)))
                named = mapping(face["groups"])
                for kind, members in self._groups.items():
                    members.append(named.get(kind))
        return np.array([self._images[face["image_id"]] for face in faces], dtype=np.int32)

    def _add_questions(self, turns: pa.Array) -> npt.NDArray[np.int32]:
        names = pc.binary_join_element_wise(pc.struct_field(turns, "task"), pc.struct_field(turns, "template"), "\0")
        coded = names.dictionary_encode()
        indices = coded.indices.to_numpy()
        here = np.empty(len(coded.dictionary), dtype=np.int32)
        for index, name in enumerate(coded.dictionary.to_pylist()):
            if name not in self._numbers:
                self._numbers[name] = len(self._asked)
                found = tasks.question_of(turns[int(np.argmax(indices == index))].as_py())
                self._asked.append(Variant(found.task, found.item, found.variant, found.claim))
            here[index] = self._numbers[name]
        return here[indices]

    def sheet(self, split: str) -> Sheet:
        """What was read."""
        places: dict[Variant, list[Rows]] = {}
        which = np.concatenate(self._which)
        for place, how in enumerate(self._asked):
            places.setdefault(how, []).append(np.flatnonzero(which == place))
        order = sorted(places, key=lambda how: (how.task, how.item, how.variant, how.claim or ""))
        rows = {how: np.sort(np.concatenate(places[how])) for how in order}
        return Sheet(
            split=split,
            sample_ids=pa.concat_arrays(self._ids),
            images=list(self._images),
            faces=np.concatenate(self._faces),
            people=np.asarray(self._owners, dtype=np.int64),
            answers=self.answers,
            rows={(how.task, how.item): at for how, at in rows.items() if how.variant == NATIVE},
            variants={how: at for how, at in rows.items() if how.variant != NATIVE},
            questions={(how.task, how.item): tasks.get(how.task).question(how.item) for how in rows},
            groups=self._groups,
        )


def read_parsed(predictions: Table, sheet: Sheet) -> list[str | None]:
    """The parsed answers of a predictions table, in the order of the sheet. Raises UserError unless every question of
    the sheet is answered exactly once and none besides."""
    return read_some(predictions, sheet, whole=True)[1]


def read_some(predictions: Table, sheet: Sheet, *, whole: bool = False) -> tuple[Rows, list[str | None]]:
    """Which questions of the sheet a table answers, and its parsed answers in the order of the sheet. Raises UserError
    when it answers one twice, or one that the sheet does not have, or if `whole` when one is missing."""
    parsed: list[str | None] = [None] * len(sheet.answers)
    found = []
    for at, batch in _matched(predictions, sheet, ["parsed"], whole=whole):
        _fill(parsed, at, batch)
        found.append(at)
    return np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int64), parsed


def read_answers(predictions: Table, sheet: Sheet) -> Answers:
    """All that a predictions table says, in the order of the sheet. Raises UserError as `read_parsed` does, and for a
    probability outside 0 to 1."""
    found = Answers.of([None] * len(sheet.answers))
    parsed, likeliest = list(found.parsed), list(found.likeliest)
    for at, batch in _matched(predictions, sheet, ["parsed", "raw", "scores"]):
        said, raw = _fill(parsed, at, batch), batch.column("raw")
        for place in np.flatnonzero(said.is_null().to_numpy(zero_copy_only=False)):
            found.refused[at[place]] = refuses(raw[int(place)].as_py() or "")
        lists = batch.column("scores")
        parents, scores = pc.list_parent_indices(lists), pc.list_flatten(lists)
        chosen = pc.fill_null(pc.equal(pc.struct_field(scores, "name"), said.take(parents)), False)
        chosen = chosen.to_numpy(zero_copy_only=False)
        probability = pc.struct_field(scores, "value").to_numpy(zero_copy_only=False)
        owners = parents.to_numpy()
        if (odd := np.flatnonzero(~((probability >= 0) & (probability <= 1)))).size:
            question = sheet.sample_ids[int(at[owners[odd[0]]])].as_py()
            raise UserError(
                f"{predictions.path}: question {question} has the score {probability[odd[0]]:g}; scores are "
                "probabilities from 0 to 1: predict again"
            )
        found.confidence[at[owners[chosen]]] = probability[chosen]
        best = np.lexsort((probability, owners))  # by question, the likeliest option last
        best = best[np.flatnonzero(np.diff(owners[best], append=-1))]
        for place, name in zip(at[owners[best]], pc.struct_field(scores, "name").take(best).to_pylist(), strict=True):
            likeliest[place] = sys.intern(name)
    return Answers(parsed, found.refused, found.confidence, likeliest)


def _fill(parsed: list[str | None], at: Rows, batch: pa.RecordBatch) -> pa.Array:
    """Put a batch's parsed answers in their places, each text kept once; returns the column."""
    column = batch.column("parsed")
    coded = column.dictionary_encode()
    words = coded.dictionary.to_pylist()
    for place, index in zip(at, coded.indices.to_pylist(), strict=True):
        parsed[place] = None if index is None else words[index]
    return column


def _matched(
    predictions: Table, sheet: Sheet, columns: Sequence[str], *, whole: bool = True
) -> Iterator[tuple[Rows, pa.RecordBatch]]:
    """Batches of predictions with the positions of their questions on the sheet."""
    answered = np.zeros(len(sheet.answers), dtype=bool)
    extra = 0
    for batch in predictions.batches(["sample_id", *columns], batch_rows=_BATCH):
        places = pc.index_in(batch.column("sample_id"), value_set=sheet.sample_ids)
        extra += places.null_count
        known = pc.is_valid(places)
        at = places.filter(known).to_numpy().astype(np.int64)
        if len(np.unique(at)) < len(at) or answered[at].any():
            raise UserError(f"{predictions.path}: a sample_id occurs twice; each question is answered once")
        answered[at] = True
        yield at, batch.filter(known)
    if whole and not answered.all():
        missing = int((~answered).sum())
        raise UserError(f"{predictions.path}: {missing} of {len(answered)} questions have no prediction; predict again")
    if extra:
        raise UserError(f"{predictions.path}: {extra} predictions answer no question of these conversations")


def model_of(predictions: Table) -> str:
    """Digest of the one model whose predictions these are. Raises UserError naming the first that is another's."""
    model: str | None = None
    for row in predictions.iterate(["sample_id", "model_digest"]):
        model = model if model is not None else str(row["model_digest"])
        if row["model_digest"] != model:
            raise UserError(
                f"{predictions.path}: question {row['sample_id']} was answered by model {row['model_digest'][:12]}, "
                f"others by {model[:12]}; score the predictions of one model at a time"
            )
    if model is None:
        raise UserError(f"{predictions.path} holds no predictions; predict again")
    return model
