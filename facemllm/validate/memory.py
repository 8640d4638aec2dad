"""What is remembered of a table's rows while it streams by, to hold the next table against it.

Of every value a mark of eight bytes stays, enough to tell whether it is still the same, too little to read it back.
That makes about 180 bytes a face and eight a value: 370 of a raw face; 900 of an annotated one in the default
configuration, where 83 answers are known, and more with more tasks. `Tallies` are counts for the report.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from facemllm import tasks
from facemllm.tables import LABELS, PAIRED, mapping
from facemllm.tables.schemas import fairness_groups
from facemllm.tasks import ZERO_SHOT
from facemllm.tasks.asking import NOT_VISIBLE
from facemllm.tasks.base import Item
from facemllm.tasks.held_out import HeldOut

Row = Mapping[str, Any]
Groups = tuple[tuple[str, str], ...]
"""Name and value of every group that a row belongs to, as (("gender", "female"), ...)."""

MARK = 8
_BLANK = bytes(MARK)

_IDENTITY = ("original_id", "width", "height", "source", "source_id", "subject_id", "split")
_LABELS = tuple(label.name for label in LABELS if label.name not in ("segmentation", "caption", *PAIRED))


def mark(value: Any) -> bytes:
    """Eight bytes that stand for a value; zeros for one that is not known (null or empty)."""
    if value is None or value == "" or value == []:
        return _BLANK
    data = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.blake2b(data, digest_size=MARK).digest()


def groups_of(row: Row) -> Groups:
    """The groups whose share is watched from filter to filter: those of fairness, and what the source says. Labels
    that are not known are left out."""
    found = fairness_groups(row)
    found |= {n: str(row[n]) for n in ("ethnicity", "expression", "source", "split") if row.get(n) is not None}
    return tuple(sorted(found.items()))


@dataclass(frozen=True)
class Count:
    """Rows by (group, value) before and after a filter, and in all."""

    before: Mapping[tuple[str, str], int]
    after: Mapping[tuple[str, str], int]
    rows_before: int
    rows_after: int


@dataclass
class Tallies:
    """`attributes` by (name, value); `exclusive` pairs of attributes found on one face; `disagreements` of captions
    with labels by item, with the `first` of each as a sentence; `questions` by (task, split); `answers` to closed
    questions by (task, item, answer)."""

    attributes: Counter[tuple[str, bool]] = field(default_factory=Counter)
    exclusive: Counter[str] = field(default_factory=Counter)
    disagreements: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    questions: Counter[tuple[str, str]] = field(default_factory=Counter)
    answers: Counter[tuple[str, str, str]] = field(default_factory=Counter)


@dataclass
class Memory:
    """Marks, groups and whereabouts of rows by image_id; of a picture that comes twice the first counts."""

    _rows: dict[str, int] = field(default_factory=dict)
    _marks: bytearray = field(default_factory=bytearray)
    _groups: array[int] = field(default_factory=lambda: array("I"))
    _kinds: dict[Groups, int] = field(default_factory=dict)
    _recalled: bytearray = field(default_factory=bytearray)

    def add(self, image_id: str | None, marks: Sequence[bytes], groups: Groups) -> None:
        """Remember a row; all rows have equally many marks."""
        if image_id is None or image_id in self._rows:
            return
        self._rows[image_id] = len(self._rows)
        self._marks += b"".join(marks)
        self._groups.append(self._kinds.setdefault(groups, len(self._kinds)))
        self._recalled.append(False)

    def recall(self, image_id: str | None) -> list[bytes] | None:
        """The marks of a picture, None if it was not there. It counts as having come through the next filter."""
        row = None if image_id is None else self._rows.get(image_id)
        if row is None:
            return None
        self._recalled[row] = True
        width = len(self._marks) // len(self._rows)
        marks = self._marks[row * width : (row + 1) * width]
        return [bytes(marks[start : start + MARK]) for start in range(0, width, MARK)]

    def count(self) -> Count:
        """How many rows of every group there were, and how many of them were recalled."""
        before = Counter(self._groups)
        after = Counter(kind for kind, recalled in zip(self._groups, self._recalled, strict=True) if recalled)
        totals: tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]] = (Counter(), Counter())
        for groups, kind in self._kinds.items():
            for group in groups:
                totals[0][group] += before[kind]
                totals[1][group] += after[kind]
        return Count(*totals, rows_before=len(self._rows), rows_after=sum(self._recalled))


class Originals:
    """What the raw faces say, so that annotation can be held to it."""

    def __init__(self) -> None:
        self.memory = Memory()
        self._names: dict[tuple[str, ...], int] = {}
        self._by_number: list[tuple[str, ...]] = []

    def add(self, row: Row, mask: bytes | None) -> None:
        """Remember a raw row and its segmentation."""
        marks = [mark(row[name]) for name in (*_IDENTITY, *_LABELS)] + [mark(mask)]
        for column in PAIRED:
            known = {name: value for name, value in mapping(row[column]).items() if value is not None}
            names = tuple(sorted(known))
            if names not in self._names:
                self._names[names] = len(self._by_number)
                self._by_number.append(names)
            marks += [self._names[names].to_bytes(MARK), mark([known[name] for name in names])]
        self.memory.add(row["image_id"], marks, groups_of(row))

    def changed(self, row: Row, mask: bytes | None) -> tuple[list[str], list[str]] | None:
        """Columns of identity and of labels in which an annotated row says something else than the raw one did; None
        if there was no such face. A label that was not known may be filled in."""
        marks = self.memory.recall(row["image_id"])
        if marks is None:
            return None
        identity = [name for name, old in zip(_IDENTITY, marks, strict=False) if mark(row[name]) != old]
        rest = marks[len(_IDENTITY) :]
        values = [*(row[name] for name in _LABELS), mask]
        names = (*_LABELS, "segmentation")
        labels = [n for n, v, old in zip(names, values, rest, strict=False) if old != _BLANK and mark(v) != old]
        paired = iter(rest[len(names) :])
        for column, number, old in zip(PAIRED, paired, paired, strict=True):
            known = mapping(row[column])
            if mark([known.get(name) for name in self._by_number[int.from_bytes(number)]]) != old:
                labels.append(column)
        return identity, labels


class Labels:
    """What the annotated faces say, so that conversations can be held to it: the answers to all that the tasks of
    conversations ask, as their manifest says it `about` them (default: all). What is held out only `zero_shot` may
    know."""

    def __init__(self, about: Mapping[str, Any] | None = None) -> None:
        self.memory = Memory()
        about, known = about or {}, tasks.all_names()
        asked = about.get("tasks")
        self._tasks = [tasks.get(name) for name in (known if asked is None else asked) if name in known]
        self._held_out = HeldOut.of(about.get("held_out") or (), self._tasks)
        if self._held_out:
            self._tasks.append(tasks.get(ZERO_SHOT))
        self._items = [(task, item) for task in self._tasks for item in task.items]
        self._names = tuple((task.name, item.name) for task, item in self._items)

    def add(self, row: Row, mask: bytes | None) -> None:
        """Remember an annotated row, its segmentation, and the answer to everything that is asked about it."""
        stored = None if mask is None else {"bytes": mask, "path": None}
        whole = {**row, "attributes": mapping(row["attributes"]), "segmentation": stored}
        reduced = {**whole, **self._held_out.changes(whole)} if self._held_out else whole
        answers = [mark(_answer(item, whole if task.name == ZERO_SHOT else reduced)) for task, item in self._items]
        head = [mark(row[name]) for name in ("source", "split", "subject_id", "caption")]
        fairness = mark(sorted(fairness_groups(row).items()))
        self.memory.add(row["image_id"], [*head, mark(mask), fairness, *answers], groups_of(row))

    def of(self, image_id: str | None) -> Face | None:
        """The marks of one face; None if there is none."""
        marks = self.memory.recall(image_id)
        if marks is None:
            return None
        source, split, subject, caption, mask, fairness, *answers = marks
        return Face(source, split, subject, caption, mask, fairness, dict(zip(self._names, answers, strict=True)))


def _answer(item: Item, row: Row) -> str | None:
    """The label of an item; where the row says that it cannot be seen, that."""
    label = item.label(row)
    return NOT_VISIBLE if label is None and item.hidden is not None and item.hidden(row) else label


@dataclass(frozen=True)
class Face:
    """Marks of an annotated face; `answers` by task and item."""

    source: bytes
    split: bytes
    subject_id: bytes
    caption: bytes
    segmentation: bytes
    groups: bytes
    answers: Mapping[tuple[str, str], bytes]
