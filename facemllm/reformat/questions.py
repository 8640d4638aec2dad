"""What is asked about a face, in which way: the plan that the settings make for training and for evaluation.

Training asks every item in one way, drawn by the weights of `reformat.forms`. Evaluation asks outright, then in every
other way that has a weight, then what is held out. Each choice is drawn by a hash of image and item.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from facemllm import tasks
from facemllm.core.draws import draw
from facemllm.errors import UserError
from facemllm.reformat.rows import FaceRow
from facemllm.settings import Reformat
from facemllm.tasks import ZERO_SHOT, asking
from facemllm.tasks.asking import Asked
from facemllm.tasks.base import CLOSED, Item, Row, Task
from facemllm.tasks.held_out import HeldOut

Chances = Mapping[tuple[str, str], tuple[str, float]]
"""(source, item) of a yes/no question -> its more frequent answer, and the share of those that training keeps."""

Questions = list[tuple[Asked, bool]]
"""What is asked, in order, and whether it follows the one before."""

_FINE = 2**32


class BrokenQuestion(ValueError):
    """A question that cannot be asked as its task puts it; the message names task, item and what is wrong."""


class Plan:
    """What the settings ask.

    Raises UserError: unknown task, or `zero_shot` among the tasks; a sensitive task without a reason, or a reason for
    no task; a held-out name that does not fit.
    """

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
        forms = qa.forms
        weights = {asking.NATIVE: forms.native, asking.STATEMENT: forms.statement, asking.LETTERED: forms.lettered}
        drawn = {way: weight for way, weight in weights.items() if weight > 0}
        total = sum(drawn.values())
        self._upto = [(way, upto / total) for way, upto in zip(drawn, accumulate(drawn.values()), strict=True)]
        self._talks = forms.dialogue / (total + forms.dialogue)
        others = [way for way in drawn if way != asking.NATIVE]
        self._evaluated = [asking.UNSEEN, *others] if qa.unseen_wordings else others

    def questions(self, row: Row, chances: Chances | None = None) -> Questions:
        """All that is asked about a row of `faces` (`attributes` a mapping). Raises BrokenQuestion."""
        seen = self.seen(row)
        return self._training(seen, chances or {}) if row["split"] == "train" else self._evaluation(seen, row)

    def seen(self, row: Row) -> Row:
        """A row as the tasks may see it: without what is held out."""
        if not self.held_out:
            return row
        changes = self.held_out.changes(row)
        return row.but(**changes) if isinstance(row, FaceRow) else {**row, **changes}

    def _training(self, row: Row, chances: Chances) -> Questions:
        found: Questions = []
        for task in self.tasks:
            talk = self._talk(task, row) if self._talks else []
            told = {asked.question.item for asked, _ in talk}
            for item in task.items:
                if item.name in told:
                    continue
                way = self._way(str(row["image_id"]), item.name)
                asked = _ask(task, item, way, row)
                if asked is None and way != asking.NATIVE:
                    asked = _ask(task, item, asking.NATIVE, row)
                if asked is not None and not _thinned(row, item, chances):
                    found.append((asked, False))
            found += talk
        return [pair for pair in found if not self._names_held_out(pair[0])] if self.held_out else found

    def _evaluation(self, row: Row, whole: Row) -> Questions:
        found = native(self.tasks, row)
        asked = [_ask(task, item, way, row) for way in self._evaluated for task in self.tasks for item in task.items]
        found += [(one, False) for one in asked if one is not None]
        if self._talks:
            found += [pair for task in self.tasks for pair in _dialogue(task, row)]
        if self.held_out:
            every = tasks.get(ZERO_SHOT)
            zero = [_ask(every, every.item(name), asking.NATIVE, whole) for name in self.held_out.names]
            found += [(one, False) for one in zero if one is not None]
        return found

    def _way(self, image_id: str, item: str) -> str:
        if len(self._upto) == 1:
            return self._upto[0][0]
        drawn = draw(_FINE, image_id, item, "way") / _FINE
        return next((way for way, upto in self._upto if drawn < upto), self._upto[-1][0])

    def _talk(self, task: Task, row: Row) -> Questions:
        drawn = draw(_FINE, str(row["image_id"]), task.name, "dialogue") < self._talks * _FINE
        talk = list(_dialogue(task, row)) if drawn else []
        named = bool(self.held_out) and any(self._names_held_out(asked) for asked, _ in talk)
        return [] if named else talk  # a talk hangs together: it goes as a whole, and its items are asked one by one

    def _names_held_out(self, asked: Asked) -> bool:
        texts = [asked.text, asked.reply, asked.template]
        if asked.question.form not in CLOSED:  # else it is an option, and those were looked at beforehand
            texts.append(asked.answer)
        return any(map(self.held_out.named_in, texts))


def native(asked: Iterable[Task], row: Row) -> Questions:
    """Everything that these tasks can ask outright about a row of `faces`."""
    found = [_ask(task, item, asking.NATIVE, row) for task in asked for item in task.items]
    return [(one, False) for one in found if one is not None]


def _ask(task: Task, item: Item, way: str, row: Row) -> Asked | None:
    try:
        return asking.ask(task, item, way, row)
    except UserError:
        raise
    except Exception as error:  # a task is code of anybody's: its row is refused, the others go on
        what = f"its label cannot be answered ({type(error).__name__}: {error})"
        raise BrokenQuestion(f"task '{task.name}', item '{item.name}': {what}") from error


def _dialogue(task: Task, row: Row) -> Iterator[tuple[Asked, bool]]:
    try:
        talk = asking.dialogue(task, row)
    except UserError:
        raise
    except Exception as error:  # as above
        what = f"{type(error).__name__}: {error}"
        raise BrokenQuestion(f"task '{task.name}': its dialogue cannot be answered ({what})") from error
    yield from ((asked, number > 0) for number, asked in enumerate(talk))


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
