"""Combinations of characteristics that no training face may show, so that evaluation can tell whether what was learnt
apart is answered together.

Names are those of `characteristics` (`Eyeglasses`, `expression=fear`). Whether a face shows one say the labels of every
task that tells it; a sensitive task's labels count only where it is asked.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.tasks import ZERO_SHOT
from facemllm.tasks.base import Item, Row, Task
from facemllm.tasks.characteristics import characteristic, members

KEY = "reformat.held_out_combinations"
JOINED = " with "

ItemValue = tuple[Item, str]
"""An item, and the value of it that a characteristic is."""


class Combinations:
    """The combinations of a configuration: `names` of each, in order. Raises UserError for a characteristic that no
    task tells, for one that is held out of training by itself, and for two answers to one question."""

    def __init__(
        self, names: Iterable[Sequence[str]], asked: Collection[Task] = (), held_out: Collection[str] = ()
    ) -> None:
        self.names = tuple(map(tuple, names))
        if not self.names:
            return
        known = _item_values(asked)
        for name in dict.fromkeys(name for own in self.names for name in own):
            if name in held_out:
                raise UserError(
                    f"{KEY}: {name} is held out of training by itself (reformat.held_out), so no combination with it "
                    "can be trained on; name another characteristic in one of the two"
                )
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
                raise UserError(f"{KEY}: no characteristic '{name}'; {hint}")
        self._values = [[known[name] for name in own] for own in self.names]
        for own, found in zip(self.names, self._values, strict=True):
            _refuse_rivals(own, found)

    def __bool__(self) -> bool:
        return bool(self.names)

    def shown(self, row: Row) -> list[int]:
        """Places in `names` of the combinations that a row of `faces` (`attributes` a mapping) shows."""
        if not self.names:
            return []
        return [
            place
            for place, own in enumerate(self._values)
            if all(any(_says(item, value, row) for item, value in found) for found in own)
        ]


def _item_values(asked: Collection[Task]) -> dict[str, list[ItemValue]]:
    """By characteristic, what tells it."""
    names = [task.name for task in asked]
    names += [name for name in tasks.all_names() if name != ZERO_SHOT and not tasks.get(name).sensitive]
    found: dict[str, list[ItemValue]] = {}
    for task in dict.fromkeys(names):
        for item in members(task):
            for value in ("yes",) if item.form == "boolean" else [option.value for option in item.options]:
                found.setdefault(characteristic(item, value), []).append((item, value))
    return found


def _refuse_rivals(names: Sequence[str], found: Sequence[Sequence[ItemValue]]) -> None:
    taken: dict[str, str] = {}
    for name, own in zip(names, found, strict=True):
        for item in (item for item, _ in own if item.form == "choice"):
            if item.name in taken:
                raise UserError(
                    f"{KEY}: {taken[item.name]} and {name} are two answers to '{item.name}', so no face shows both; "
                    "name characteristics that can be seen together"
                )
            taken[item.name] = name


def _says(item: Item, value: str, row: Row) -> bool:
    try:
        return item.label(row) == value
    except Exception:  # a task is code of anybody's; where it is asked, the row is refused
        return False
