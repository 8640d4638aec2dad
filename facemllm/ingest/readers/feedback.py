"""Corrections that users of the model server sent (`serve.feedback.folder`), with the pictures they agreed to give.

    corrections.jsonl       a line a correction (facemllm/core/corrections.py)
    pictures/<SHA-256>      the pictures, as they were sent

A correction of a task's item becomes the label that makes the item's true answer what was said: an age, an expression,
attributes (a hair colour says of every other colour that it is not it). Corrections of one picture become one row; a
label about which two of them differ is left out. Nobody is named: every picture is a person of its own.
Splits: train alone, since strangers' labels are to teach and not to measure; option split: drawn draws as elsewhere.
Refused: corrections without consent, or to another consent text than the option `consent` names (empty: to any); those
of free questions, and of items that no label answers; pictures whose corrections contradict one another throughout.
`source_id` is the picture's digest, by which `facemllm forget --image` finds it, here and in every table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facemllm import tasks
from facemllm.core.corrections import LINES, PICTURES, Correction, read
from facemllm.errors import UserError
from facemllm.ingest.reader import Face, Reader, Refused
from facemllm.tables import LABELS, PAIRED, SPLITS
from facemllm.tasks.base import Item

_Key = tuple[str, str]
"""A column of `faces`, and the name in it of a paired one."""


@dataclass
class _Picture:
    """What was said of one picture: its labels, and those about which two corrections differ."""

    row: int
    labels: dict[_Key, Any] = field(default_factory=dict)
    doubtful: set[_Key] = field(default_factory=set)


def faces(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """A face a picture, in the order of first corrections. Raises UserError when there is no file of corrections."""
    if not (root / LINES).is_file():
        raise UserError(f"{root / LINES}: not there; give the folder that serve.feedback.folder names")
    pictures: dict[str, _Picture] = {}
    for number, found in read(root):
        said = found if isinstance(found, str) else _usable(found, options["consent"])
        if isinstance(said, str):
            yield Refused(LINES, number, said)
            continue
        assert isinstance(found, Correction)
        held = pictures.setdefault(found.image, _Picture(number))
        for key, value in said.items():
            if held.labels.setdefault(key, value) != value:
                held.doubtful.add(key)
    for image, held in pictures.items():
        labels = _columns({key: value for key, value in held.labels.items() if key not in held.doubtful})
        if not labels:
            yield Refused(LINES, held.row, "the corrections of this picture contradict one another")
            continue
        train = options["split"] == "train"
        yield Face(
            row=held.row,
            source_id=image,
            image=root / PICTURES / image,
            split="train" if train else None,
            labels=labels,
            official=SPLITS if train else (),
        )


READERS = {"feedback": Reader(faces, {"split": ("train", "drawn"), "consent": ()})}


def _usable(found: Correction, consent: str) -> dict[_Key, Any] | str:
    """The labels that a correction says, or why it cannot be used."""
    if not found.consent:
        return "no consent was given"
    if consent and found.consent_text != consent:
        return f"consent was given to text {found.consent_text}, not to {consent}"
    if not found.picture:
        return "no picture was given"
    if found.task not in tasks.all_names() or found.label is None:
        return "a question that is no task's"
    item = tasks.get(str(found.task)).find(found.item or "")
    if item is None:
        return f"the task {found.task} has no item of that name"
    return labels_of(item, found.label) or f"no label of a face answers {found.task}.{item.name}"


def labels_of(item: Item, value: str) -> dict[_Key, Any]:
    """Labels of a face by which the item's true answer is this value; empty where none are known to say it.

    They are tried, not known: each kind of item has labels that usually answer it, and the item itself is asked.
    """
    for labels in _candidates(item, value):
        row = {"source": "feedback", **_columns(labels)}
        if item.label(row) == value:
            return labels
    return {}


def _candidates(item: Item, value: str) -> Iterator[dict[_Key, Any]]:
    if item.form == "boolean":
        yield {("attributes", item.name): value == "yes"}
        yield {("action_units", item.name): float(value == "yes")}
    elif item.form == "number":
        try:
            yield {(item.name, ""): float(value)}
        except ValueError:
            return
    elif item.form == "choice":
        yield {("attributes", option.value): option.value == value for option in item.options}
        yield from ({(label.name, ""): value} for label in LABELS if not label.numeric and not label.paired)


def _columns(labels: Mapping[_Key, Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for (column, name), value in labels.items():
        if column in PAIRED:
            columns.setdefault(column, {})[name] = value
        else:
            columns[column] = value
    return columns
