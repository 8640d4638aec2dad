"""What is asked about a face: the plan that the settings make for training and for evaluation, and rows of `faces` as
the tasks read them, decoded by column; pictures, and what no task asks for, are left alone.

Training asks every item outright and beside it in every other variant that has a weight in `reformat.forms`, by which
turns are drawn later; statements are made of several values. Evaluation asks outright, then in every other variant that
has a weight, then what is held out. Each choice is drawn by a hash of image and item.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from facemllm import tables, tasks
from facemllm.core.digests import draw
from facemllm.errors import UserError
from facemllm.settings import Reformat
from facemllm.tables import Table
from facemllm.tasks import ZERO_SHOT, asking
from facemllm.tasks.asking import Asked
from facemllm.tasks.base import CLOSED, Item, Row, Task
from facemllm.tasks.combinations import Combinations
from facemllm.tasks.held_out import HeldOut

PICTURES = ("image", "segmentation")
LABELS = (
    *("image_id", "original_id", "source", "source_id", "subject_id", "split", "caption", "attributes"),
    *("expression", "age", "gender", "skin_tone", "yaw", "pitch", "roll"),
)
RARE = (*(label.name for label in tables.LABELS if label.name not in (*LABELS, *PICTURES)), "width", "height")
"""Columns that few tasks look at: decoded when one does."""

Chances = Mapping[tuple[str, str], tuple[str, float]]
"""(source, item) of a yes/no question -> its more frequent answer, and the share of those that training keeps."""

Questions = list[tuple[Asked, bool]]
"""What is asked, in order, and whether it follows the one before."""

_FINE = 2**32
Found = TypeVar("Found")


class FaceRow(dict[str, Any]):
    """A row of `faces` whose rare columns, and segmentation, are decoded once they are asked for."""

    def __init__(self, values: Mapping[str, Any], number: int, columns: dict[str, list[Any]], batch: pa.RecordBatch):
        super().__init__(values)
        self._number, self._columns, self._batch = number, columns, batch

    def __missing__(self, name: str) -> Any:
        if name not in self._columns:
            if name not in self._batch.schema.names:
                raise KeyError(name)
            self._columns[name] = self._batch.column(name).to_pylist()
        value = self[name] = self._columns[name][self._number]
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """As of any mapping; a rare column is decoded."""
        try:
            return self[name]
        except KeyError:
            return default

    def but(self, **changed: Any) -> FaceRow:
        """The same row with other values in some columns."""
        return FaceRow({**self, **changed}, self._number, self._columns, self._batch)


def batches(table: Table, *, pictures: bool) -> Iterator[tuple[pa.RecordBatch, list[FaceRow]]]:
    """Stream batches of a faces table with their rows, `attributes` as mappings. It is light without `pictures`."""
    found = table.batches([*LABELS, *RARE, *(PICTURES if pictures else ("segmentation",))])
    return ((batch, rows_of(batch)) for batch in found)


def rows_of(batch: pa.RecordBatch) -> list[FaceRow]:
    """The rows of a batch."""
    plain = [name for name in LABELS if name != "attributes"]
    values = [batch.column(name).to_pylist() for name in plain]
    decoded: dict[str, list[Any]] = {}
    return [
        FaceRow({**dict(zip(plain, row, strict=True)), "attributes": known}, number, decoded, batch)
        for number, (known, *row) in enumerate(zip(_mappings(batch.column("attributes")), *values, strict=True))
    ]


def _mappings(column: pa.ListArray) -> Sequence[Mapping[str, Any]]:
    """Stored lists of (name, value) pairs as mappings; null is empty."""
    pairs = column.flatten()
    names, values = pairs.field("name").to_pylist(), pairs.field("value").to_pylist()
    found, start = [], 0
    for length in column.value_lengths().to_pylist():
        end = start + (length or 0)
        found.append(dict(zip(names[start:end], values[start:end], strict=True)))
        start = end
    return found


class BrokenQuestion(ValueError):
    """A question that cannot be asked as its task puts it; the message names task, item and what is wrong."""


class Plan:
    """What the settings ask. Raises UserError: unknown task, or `zero_shot` among the tasks; a sensitive task without a
    reason, or a reason for no task; a held-out name, or combination, that does not fit."""

    def __init__(self, qa: Reformat) -> None:
        if ZERO_SHOT in qa.tasks:
            raise UserError(
                f"reformat.tasks: '{ZERO_SHOT}' is asked at evaluation alone, of what reformat.held_out names; take it "
                "out of reformat.tasks and name the attributes there"
            )
        self.tasks = [tasks.get(name) for name in dict.fromkeys(qa.tasks)]
        _refuse_unknown_reasons(qa)
        self.tasks.sort(key=lambda task: task.name != "caption")
        self.reasons = {task.name: _reason(qa, task.name, task.name) for task in self.tasks if task.sensitive}
        self.reasons |= {name: _reason(qa, task.name, name) for task in self.tasks for name in task.reveals}
        self.held_out = HeldOut.of(qa.held_out, self.tasks)
        self.combinations = Combinations(qa.held_out_combinations, self.tasks, qa.held_out)
        forms = qa.forms
        others = {asking.STATEMENT: forms.statement, asking.LETTERED: forms.lettered}
        self._others = [variant for variant, weight in others.items() if weight > 0]
        self._dialogues = forms.dialogue / (forms.native + sum(others.values()) + forms.dialogue)
        self._evaluated = [asking.NATIVE, *([asking.UNSEEN] if qa.unseen_wordings else []), *self._others]

    def questions(self, row: Row, chances: Chances | None = None) -> Questions:
        """All that is asked about a row of `faces` (`attributes` a mapping). Raises BrokenQuestion."""
        shown = self.without_held_out(row)
        return self._training(shown, chances or {}) if row["split"] == "train" else self._evaluation(shown, row)

    def without_held_out(self, row: Row) -> Row:
        """A row as the tasks may see it."""
        if not self.held_out:
            return row
        changes = self.held_out.changes(row)
        return row.but(**changes) if isinstance(row, FaceRow) else {**row, **changes}

    def _training(self, row: Row, chances: Chances) -> Questions:
        found: Questions = []
        for task in self.tasks:
            dialogue = self._dialogue(task, row) if self._dialogues else []
            in_dialogue = {asked.question.item for asked, _ in dialogue}
            for item in task.items:
                if item.name in in_dialogue:
                    continue
                if not _thinned(row, item, chances):
                    found += _alone(self._asked(task, item, row))
            found += dialogue
        return [pair for pair in found if not self._names_held_out(pair[0])] if self.held_out else found

    def _evaluation(self, row: Row, whole: Row) -> Questions:
        found = _alone(_ask(t, item, v, row) for v in self._evaluated for t in self.tasks for item in t.items)
        if self._dialogues:
            found += [pair for task in self.tasks for pair in _dialogue(task, row)]
        if self.held_out:
            every = tasks.get(ZERO_SHOT)
            found += _alone(_ask(every, every.item(name), asking.NATIVE, whole) for name in self.held_out.names)
        return found

    def _asked(self, task: Task, item: Item, row: Row) -> Iterator[Asked | None]:
        yield _ask(task, item, asking.NATIVE, row)
        for variant in self._others:
            if variant == asking.STATEMENT:
                yield from _guarded(task, item, lambda: asking.claims(task, item, row))
            else:
                yield _ask(task, item, variant, row)

    def _dialogue(self, task: Task, row: Row) -> Questions:
        drawn = draw(_FINE, str(row["image_id"]), task.name, "dialogue") < self._dialogues * _FINE
        found = list(_dialogue(task, row)) if drawn else []
        named = bool(self.held_out) and any(self._names_held_out(asked) for asked, _ in found)
        return [] if named else found  # it goes as a whole, and its items are asked one by one

    def _names_held_out(self, asked: Asked) -> bool:
        texts = [asked.text, asked.reply, asked.template]
        if asked.question.form not in CLOSED:  # else it is an option, and those were looked at beforehand
            texts.append(asked.answer)
        return any(map(self.held_out.named_in, texts))


def _alone(found: Iterable[Asked | None]) -> Questions:
    return [(one, False) for one in found if one is not None]


def _ask(task: Task, item: Item, variant: str, row: Row) -> Asked | None:
    return _guarded(task, item, lambda: asking.ask(task, item, variant, row))


def _guarded(task: Task, item: Item, ask: Callable[[], Found]) -> Found:
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:  # a task is code of anybody's: its row is refused, the others go on
        what = f"its label cannot be answered ({type(error).__name__}: {error})"
        raise BrokenQuestion(f"task '{task.name}', item '{item.name}': {what}") from error


def _dialogue(task: Task, row: Row) -> Iterator[tuple[Asked, bool]]:
    try:
        found = asking.dialogue(task, row)
    except UserError:
        raise
    except Exception as error:  # as above
        what = f"{type(error).__name__}: {error}"
        raise BrokenQuestion(f"task '{task.name}': its dialogue cannot be answered ({what})") from error
    yield from ((asked, number > 0) for number, asked in enumerate(found))


def _thinned(row: Row, item: Item, chances: Chances) -> bool:
    frequent, kept = chances.get((str(row["source"]), item.name), (None, 1.0))
    if frequent is None or item.label(row) != frequent:
        return False
    return draw(_FINE, str(row["image_id"]), item.name, "balance") >= kept * _FINE


def _refuse_unknown_reasons(qa: Reformat) -> None:
    known = tasks.all_names()
    for name in qa.reasons:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known tasks: {', '.join(known)}"
            raise UserError(f"reformat.reasons.{name}: no task '{name}'; {hint}")


def _reason(qa: Reformat, task: str, sensitive: str) -> str:
    reason = (qa.reasons.get(sensitive) or "").strip()
    if not reason:
        does = "is sensitive" if task == sensitive else f"states what the sensitive task '{sensitive}' asks"
        raise UserError(
            f"reformat.reasons.{sensitive}: the task '{task}' {does} and is asked only for a reason; write one "
            f"sentence there (--set reformat.reasons.{sensitive}='...'), or take '{task}' out of reformat.tasks"
        )
    return reason
