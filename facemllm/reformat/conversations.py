"""Asked questions as rows of `conversations`, built column by column: Python touches each text once.

Names are digests of canonical JSON (`digests.of_json`), put together from parts that are written once a wording. A
test holds them against `digests.of_json` of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from json.encoder import encode_basestring as quoted  # strings as `json.dumps` writes them
from typing import Any

import numpy as np
import pyarrow as pa

from facemllm.core import digests
from facemllm.reformat.questions import BrokenQuestion, Questions
from facemllm.tables import CONVERSATIONS
from facemllm.tables.schemas import fairness_groups
from facemllm.tasks.asking import Asked
from facemllm.tasks.base import CLOSED, Form

_MESSAGE = CONVERSATIONS.field("messages").type.value_type
_PART = _MESSAGE.field("content").type.value_type
_TURN = CONVERSATIONS.field("turns").type.value_type
_PAIR = CONVERSATIONS.field("groups").type.value_type
_TAKEN = ("image_id", "image", "segmentation", "split", "source", "subject_id")
_PICTURE = '{"content":[{"text":null,"type":"image"},'
_OPENED = len('{"content":[')
_KEPT = 50_000  # wordings remembered; with drawn letters there are more of them than anyone could hold


@dataclass(frozen=True, slots=True)
class Wording:
    """A question and its reply in words, and what all rows with it share: parts of JSON, the number of its options."""

    task: str
    form: Form
    template: str
    question: str
    reply: str
    options: int
    named: str
    exchange: str
    between: str
    after: str


class ConversationBatch:
    """Collects conversations of one batch of faces; `batch` gives them as Arrow columns."""

    def __init__(self) -> None:
        self._wordings: dict[tuple[str, str, str, str], Wording] = {}
        self._lists: dict[tuple[str, ...], int] = {}
        self._listed: list[tuple[str, ...]] = []
        self._clear()

    def _clear(self) -> None:
        if len(self._wordings) > _KEPT:
            self._wordings, self._lists, self._listed = {}, {}, []
        self._kept: list[int] = []
        self._ids: list[str] = []
        self._groups: list[Mapping[str, str]] = []
        self._counts: list[int] = []
        self._texts: list[str | None] = []
        self._turns: list[tuple[Wording, str, str, bool]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def wording(self, asked: Asked) -> Wording:
        """The wording of an asked question. Raises BrokenQuestion when it is none that could be answered."""
        key = (asked.question.task, asked.template, asked.text, asked.reply)
        found = self._wordings.get(key)
        if found is None:
            found = self._written(asked)
            if asked.question.form in CLOSED:
                self._wordings[key] = found
        return found

    def _written(self, asked: Asked) -> Wording:
        question = asked.question
        values, words = tuple(o.value for o in question.options), [o.text for o in question.options]
        _check(asked, values, words)
        if values not in self._lists:
            self._lists[values] = len(self._listed)
            self._listed.append(values)
        said, replied = quoted(asked.text), quoted(asked.reply)
        options = ",".join(map(quoted, values))
        return Wording(
            task=question.task,
            form=question.form,
            template=asked.template,
            question=asked.text,
            reply=asked.reply,
            options=self._lists[values],
            named=f",{quoted(question.task)},{quoted(question.item)},{quoted(asked.template)}]",
            exchange=f'{{"content":[{{"text":{said},"type":"text"}}],"role":"user"}},'
            f'{{"content":[{{"text":{replied},"type":"text"}}],"role":"assistant"}}',
            between=f',"form":{quoted(question.form)},"options":[{options}],"sample_id":"',
            after=f'","task":{quoted(question.task)},"template":{quoted(asked.template)}}}',
        )

    def add(self, number: int, row: Mapping[str, Any], asked: Questions) -> None:
        """Add the conversation about row `number` of the batch: what is asked, and whether it follows the one before.
        Raises BrokenQuestion; then nothing was added."""
        wordings = [self.wording(one) for one, _ in asked]
        face = "[" + quoted(row["image_id"])
        messages = ",".join([wording.exchange for wording in wordings])
        turns, written = [], []
        for (one, follows), wording in zip(asked, wordings, strict=True):
            sample = sha256((face + wording.named).encode()).hexdigest()
            said = f'{{"answer":{quoted(one.answer)},"follows":{"true" if follows else "false"}'
            written.append(f"{said}{wording.between}{sample}{wording.after}")
            turns.append((wording, sample, one.answer, follows))
        groups, mask = fairness_groups(row), row["segmentation"]
        picture = None if mask is None else digests.of_bytes(mask["bytes"] or b"")
        said = ",".join(f'{{"name":{quoted(name)},"value":{quoted(groups[name])}}}' for name in sorted(groups))
        content = (
            f'{{"groups":[{said}],"image_id":{quoted(row["image_id"])},"messages":[{_PICTURE}{messages[_OPENED:]}],'
            f'"segmentation":{_text(picture)},"source":{_text(row["source"])},"split":{_text(row["split"])},'
            f'"subject_id":{_text(row["subject_id"])},"turns":[{",".join(written)}]}}'
        )
        self._kept.append(number)
        self._ids.append(sha256(content.encode()).hexdigest())
        self._groups.append(groups)
        self._counts.append(len(asked))
        self._texts.append(None)
        for wording in wordings:
            self._texts += (wording.question, wording.reply)
        self._turns += turns

    def batch(self, faces: pa.RecordBatch) -> pa.Table:
        """All that was added, as a table of `conversations`; `faces` is the batch of rows it was added for."""
        kept = pa.array(self._kept, pa.int64())
        taken = {name: faces.column(name).take(kept) for name in _TAKEN}
        images = taken.pop("image")
        columns = {
            **taken,
            "conversation_id": pa.array(self._ids, pa.string()),
            "images": pa.ListArray.from_arrays(_offsets(np.ones(len(kept), np.int32)), images),
            "groups": self._group_column(),
            "messages": self._message_column(),
            "turns": self._turn_column(),
        }
        made = pa.table([columns[field.name] for field in CONVERSATIONS], schema=CONVERSATIONS)
        self._clear()
        return made

    def _group_column(self) -> pa.Array:
        found = [(name, groups[name]) for groups in self._groups for name in sorted(groups)]
        values = pa.StructArray.from_arrays(
            [pa.array([pair[place] for pair in found], pa.string()) for place in (0, 1)], fields=list(_PAIR)
        )
        return pa.ListArray.from_arrays(_offsets([len(groups) for groups in self._groups]), values)

    def _message_column(self) -> pa.Array:
        turns = np.array(self._counts, np.int64)
        first = np.concatenate([[0], np.cumsum(2 * turns)[:-1]]).astype(np.int64)
        parts = np.ones(2 * int(turns.sum()), np.int32)
        parts[first] = 2
        kinds = np.full(len(self._texts), 1, np.int8)
        kinds[first + np.arange(len(first))] = 0
        kind = pa.array(["image", "text"]).take(pa.array(kinds))
        content = pa.StructArray.from_arrays([kind, pa.array(self._texts, pa.string())], fields=list(_PART))
        role = pa.array(["user", "assistant"]).take(pa.array(np.arange(len(parts), dtype=np.int64) % 2))
        messages = pa.StructArray.from_arrays(
            [role, pa.ListArray.from_arrays(_offsets(parts), content)], fields=list(_MESSAGE)
        )
        return pa.ListArray.from_arrays(_offsets(2 * turns), messages)

    def _turn_column(self) -> pa.Array:
        used, samples, answers, follows = zip(*self._turns, strict=True)
        numbers, place = np.unique(np.array([wording.options for wording in used], np.int64), return_inverse=True)
        lists = pa.array([self._listed[number] for number in numbers], pa.list_(pa.string()))
        columns = {
            "sample_id": pa.array(samples, pa.string()),
            "task": pa.array([wording.task for wording in used], pa.string()),
            "form": pa.array([wording.form for wording in used], pa.string()),
            "template": pa.array([wording.template for wording in used], pa.string()),
            "options": lists.take(pa.array(place)),
            "answer": pa.array(answers, pa.string()),
            "follows": pa.array(follows, pa.bool_()),
        }
        turns = pa.StructArray.from_arrays([columns[field.name] for field in _TURN], fields=list(_TURN))
        return pa.ListArray.from_arrays(_offsets(self._counts), turns)


def _offsets(counts: Iterable[int] | np.ndarray[Any, Any]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int32))


def _text(value: str | None) -> str:
    return "null" if value is None else str(quoted(value))


def _check(asked: Asked, values: Sequence[str], words: Sequence[str]) -> None:
    question = asked.question
    where = f"task '{question.task}', item '{question.item}'"
    for what, text in (("question", asked.text), ("reply", asked.reply), ("answer", asked.answer)):
        if not isinstance(text, str) or not text.strip():
            raise BrokenQuestion(f"{where}: the {what} is empty")
    if "{" in asked.text or "}" in asked.text:
        raise BrokenQuestion(f"{where}: the wording has a slot that nothing fills: {asked.text}")
    if question.form in CLOSED and asked.reply not in words:
        raise BrokenQuestion(f"{where}: the reply '{asked.reply}' is none of the options")
    if question.form in CLOSED and question.form != "number" and asked.answer not in values:
        raise BrokenQuestion(f"{where}: the answer '{asked.answer}' is none of the options")
