"""Faces with all attributes known, and a conversation about one in which everything is asked outright."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from facemllm import tasks
from facemllm.reformat.conversations import ConversationBatch
from facemllm.reformat.questions import rows_of
from facemllm.tables import FACES, pairs
from facemllm.tasks import asking
from facemllm.tasks.base import Item, Task


def conversation(row: Mapping[str, Any], asked: Sequence[Task]) -> dict[str, Any] | None:
    """All that can be asked outright about a row of `faces`, as a row of `conversations`; None if nothing can."""
    batch = pa.RecordBatch.from_pylist([dict(row)], FACES)
    (face,) = rows_of(batch)
    found = (asking.ask(task, item, asking.NATIVE, face) for task in asked for item in task.items)
    questions = [(one, False) for one in found if one is not None]
    if not questions:
        return None
    made = ConversationBatch()
    made.add(0, face, questions)
    (talk,) = made.batch(batch).to_pylist()
    return dict(talk)


def with_attributes(rows: Iterable[Mapping[str, Any]], caption: str, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of `faces` with drawn answers to all items of `attributes`, and this caption."""
    rng, made = random.Random(seed), []
    for row in rows:
        known: dict[str, bool] = {}
        for item in tasks.get("attributes").items:
            one = rng.choice(item.options).value
            group = item.form == "choice"
            known |= {o.value: o.value == one for o in item.options} if group else {item.name: one == "yes"}
        made.append(dict.fromkeys(FACES.names) | dict(row) | {"attributes": pairs(known), "caption": caption})
    return made


def phrases_of(item: Item) -> list[str]:
    """Every phrase with which an item is answered or mentioned in a caption, each once."""
    mentioned = [text for option in item.options if (text := item.mention(option.value)) is not None]
    return list(dict.fromkeys([option.text for option in item.options] + mentioned))


def phrases() -> list[str]:
    """The phrases of all items, each once ("yes" and "no" too)."""
    items = [item for name in tasks.all_names() for item in tasks.get(name).items]
    return list(dict.fromkeys(text for item in items for text in phrases_of(item)))
