"""What a model is asked about a face: the words, the labels it is given to trust, and the one request for repair.

A conversation is a list of plain messages, `role` and `text`; the picture stands in the first user message. Its digest
is the `prompt_hash` of provenance and part of the key of a stored reply, so a changed word asks anew and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from facemllm.annotate import replies
from facemllm.core import digests
from facemllm.tables import mapping
from facemllm.tasks import attributes, head_pose
from facemllm.tasks.items import Choice
from facemllm.tasks.labels import number_text

Messages = list[dict[str, str]]

COLUMNS = ("attributes", "expression", "age", "gender", "yaw", "pitch", "roll")
"""The columns of `faces` that hold labels to trust."""

_SYSTEM = (
    "You describe pictures of faces for a dataset. You never name or identify a person. "
    "You answer with one JSON object and nothing else."
)
_TASK = """Describe the face in the picture as one JSON object with exactly these keys:
caption: two to five plain sentences about what can be seen: apparent age and gender, hair, beard, eyes, what is worn, \
expression, and how the head is turned. State facts without hedging. Say an age as in "about 35 years old". Say of a \
thing only that it is there. No name, no guess at who it is, no origin, health or character.
attributes: an object with a value for every name below: true, false, or null where the picture does not show it.
expression: one of {expressions}, or null.
age: apparent age in whole years, or null.
gender: {genders} as it appears, or null.
Names of the attributes, with the words that the caption uses for them:
{attributes}"""
_KNOWN = """
The dataset already says this of the face. Trust it; caption and values must not contradict it:
{known}"""
_REPAIR = "Your answer does not fit: {problem}. Answer again with the whole corrected JSON object and nothing else."


def messages(row: Mapping[str, Any]) -> Messages:
    """The request about a row of `faces`, with the row's own labels in it."""
    text = _instructions()
    if known := trusted(row):
        text += _KNOWN.format(known=json.dumps(known, sort_keys=True, ensure_ascii=True))
    return [{"role": "system", "text": _SYSTEM}, {"role": "user", "text": text}]


def repair(asked: Messages, answer: str, problem: str) -> Messages:
    """The conversation so far, and the request to mend an answer that does not fit."""
    return [*asked, {"role": "assistant", "text": answer}, {"role": "user", "text": _REPAIR.format(problem=problem)}]


def trusted(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the source says of a row, as the model is told: labels, and the head's pose in words."""
    stored = row.get("attributes")
    known = stored if isinstance(stored, Mapping) else mapping(stored)
    told: dict[str, Any] = {"attributes": {name: value for name, value in known.items() if value is not None}}
    told["expression"] = row.get("expression")
    told["age"] = number_text(None if row.get("age") is None else round(row["age"], 1))
    told["gender"] = row.get("gender")
    told["head"] = ", ".join(p for item in head_pose.TASK.items if (p := head_pose.TASK.phrase(row, item.name)))
    return {name: value for name, value in told.items() if value not in (None, "", {})}


def digest(asked: Messages) -> str:
    """SHA-256 of a conversation's words."""
    return digests.of_json(asked)


@cache
def template_digest() -> str:
    """SHA-256 of all that is asked of every row alike: words and schema."""
    return digests.of_json([_SYSTEM, _instructions(), _KNOWN, _REPAIR, replies.schema()])


@cache
def _instructions() -> str:
    lines = []
    for item in attributes.TASK.items:
        if isinstance(item, Choice):
            lines += [f"{option.value} ({option.text})" for option in item.options]
        else:
            lines.append(f"{item.name} ({item.mention('yes')})")
    return _TASK.format(
        expressions=", ".join(replies.expressions()),
        genders=" or ".join(replies.genders()),
        attributes=", ".join(lines),
    )
