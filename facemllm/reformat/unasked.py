"""Attributes and expressions that a source has labels of and that no question asks about, and the tasks that would ask.

Drawn heads are left out: whoever draws them knows what is asked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain

from facemllm import tasks
from facemllm.reformat.questions import FaceRow
from facemllm.tasks import ZERO_SHOT
from facemllm.tasks.base import CLOSED, Task

_EXPRESSION, _NAMED = "expression ", 6
_TRIED = 5  # faces of a label: an item may need others beside it, which some faces lack


class Unasked:
    """Looks at one row of `faces` after the other; `counts` are faces by label that none of `asked` is about."""

    def __init__(self, asked: Iterable[Task], held_out: Iterable[str]) -> None:
        self._asked, self._settled = list(asked), {*held_out, "Male"}  # what Male says stands in a column of its own
        self._counts: Counter[str] = Counter()
        self._others: dict[str, set[str]] = defaultdict(set)

    def see(self, row: FaceRow) -> None:
        """Take a row into account."""
        if row["source"] == "render":
            return
        expression = () if row["expression"] is None else (f"{_EXPRESSION}{row['expression']}",)
        for label in (*row["attributes"], *expression):
            if label in self._settled:
                continue
            self._counts[label] += 1
            if self._counts[label] > _TRIED:
                continue
            without = _without(row, label)
            if any(_reads(task, row, without) for task in self._asked):
                self._settled.add(label)
                del self._counts[label]
            else:
                self._others[label] |= {task.name for task in _further(self._asked) if _reads(task, row, without)}

    @property
    def counts(self) -> dict[str, int]:
        """Faces by label that nothing is asked about."""
        return dict(sorted(self._counts.items()))

    def notes(self) -> Iterator[str]:
        """What to tell a user: the labels, and which tasks ask about them."""
        left = set(self._counts)
        while left:
            offers = Counter(chain.from_iterable(self._others[label] for label in left))
            best = min(offers, key=lambda name: (-offers[name], name), default=None)
            covered = {label for label in left if best is None or best in self._others[label]}
            named = ", ".join(f"{label} ({self._counts[label]:,} faces)" for label in sorted(covered)[:_NAMED])
            named += f" and {len(covered) - _NAMED} more" if len(covered) > _NAMED else ""
            if best is None:
                yield f"no task has a question about {named}; docs/data.md, 'Your own pictures', says why that may be"
            else:
                how = f"add {best} to reformat.tasks and {best}: 1.0 to the tasks of a stage"
                reason = f", with a reason in reformat.reasons.{best}" if tasks.get(best).sensitive else ""
                yield f"nothing is asked about {named}; {how}{reason}"
            left -= covered


def _without(row: FaceRow, label: str) -> FaceRow:
    if label.startswith(_EXPRESSION):
        return row.but(expression=None)
    return row.but(attributes={name: value for name, value in row["attributes"].items() if name != label})


def _further(asked: list[Task]) -> Iterator[Task]:
    names = {task.name for task in asked} | {ZERO_SHOT}
    return (task for name in tasks.all_names() if name not in names and not (task := tasks.get(name)).reveals)


def _reads(task: Task, row: FaceRow, without: FaceRow) -> bool:
    """Whether an answer of closed questions goes by a label."""
    found = False
    with suppress(Exception):  # a task is code of anybody's: its row is refused when it is asked
        found = any(item.label(row) != item.label(without) for item in task.items if item.form in (*CLOSED, "several"))
    return found
