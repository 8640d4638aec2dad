"""What a model is asked about a face, and what it may reply.

A conversation is a list of plain messages, `role` and `text`; the picture stands in the first user message. Its digest
is the `prompt_hash` of provenance and part of the key of a stored reply, so a changed word asks anew and nothing else.

A reply is one JSON object with a caption and labels, under a schema made from the tasks. `schema()` is what an endpoint
is asked to keep to, in the strict dialect of JSON Schema that OpenAI-compatible servers take: every key required,
nothing besides. `read` checks a reply against the same vocabulary, whoever wrote it; the one licence is that an
attribute that is left out is unknown, as one that is null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from facemllm.core import digests
from facemllm.tasks import attributes, expression, gender, head_pose
from facemllm.tasks.answers import MAX_TEXT
from facemllm.tasks.base import known, number_text
from facemllm.tasks.items import Choice
from facemllm.tasks.spoken import spoken

READING = 2
"""Number of how `read` takes replies: raise it with what fits and what is made of it. A test holds them together."""

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

EXPRESSIONS, GENDERS = (tuple(o.value for o in task.items[0].options) for task in (expression.TASK, gender.TASK))
ATTRIBUTES = {
    name: words
    for item in attributes.TASK.items
    for name, words in (
        ((o.value, o.text) for o in item.options) if isinstance(item, Choice) else ((item.name, item.mention("yes")),)
    )
}
"""Every attribute that the tasks ask about, in their order, and the words of a caption."""

KEYS = ("caption", "attributes", "expression", "age", "gender")
SHORTEST = 20  # characters of a caption
OLDEST = 120  # years
LONGEST = 64_000  # characters of a reply


class Misfit(ValueError):
    """A reply that does not fit; the message says what is wrong with it, in words that its writer can act on."""


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
    """What the source says of a row, as the model is stated: labels, and the head's pose in words."""
    stated: dict[str, Any] = {"attributes": {n: v for n, v in known(row, "attributes").items() if v is not None}}
    stated["expression"] = row.get("expression")
    stated["age"] = number_text(None if row.get("age") is None else round(row["age"], 1))
    stated["gender"] = row.get("gender")
    angles = ((item, item.label(row)) for item in head_pose.TASK.items)
    stated["head"] = ", ".join(item.option_for(label).text for item, label in angles if label is not None)
    return {name: value for name, value in stated.items() if value not in (None, "", {})}


@cache
def template_digest() -> str:
    """SHA-256 of all that is asked of every row alike: words and schema."""
    return digests.of_json([_SYSTEM, _instructions(), _KNOWN, _REPAIR, schema()])


@cache
def _instructions() -> str:
    return _TASK.format(
        expressions=", ".join(EXPRESSIONS),
        genders=" or ".join(GENDERS),
        attributes=", ".join(f"{name} ({words})" for name, words in ATTRIBUTES.items()),
    )


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a reply."""
    known = {
        "caption": {"type": "string", "description": "two to five sentences about what can be seen"},
        "attributes": {
            "type": "object",
            "properties": {name: {"type": ["boolean", "null"]} for name in ATTRIBUTES},
            "required": list(ATTRIBUTES),
            "additionalProperties": False,
        },
        "expression": {"type": ["string", "null"], "enum": [*EXPRESSIONS, None]},
        "age": {"type": ["integer", "null"], "description": f"years, 0 to {OLDEST}"},
        "gender": {"type": ["string", "null"], "enum": [*GENDERS, None]},
    }
    return {"type": "object", "properties": known, "required": list(KEYS), "additionalProperties": False}


def read(text: str) -> dict[str, Any]:
    """Caption and labels from a reply: `caption`, and of the labels those that are known (`attributes` as a mapping).
    Raises Misfit saying what does not fit."""
    reply = _parsed(text)
    if missing := [key for key in KEYS if key not in reply]:
        raise Misfit(f"the key {', '.join(missing)} is missing")
    if unknown := sorted(reply.keys() - set(KEYS)):
        raise Misfit(f"unknown key {', '.join(map(_shown, unknown[:3]))}; the keys are {', '.join(KEYS)}")
    labels = {
        "attributes": _attributes(reply["attributes"]),
        "expression": _one_of("expression", reply["expression"], EXPRESSIONS),
        "age": _age(reply["age"]),
        "gender": _one_of("gender", reply["gender"], GENDERS),
    }
    known = {key: value for key, value in labels.items() if value not in (None, {})}
    return {"caption": _caption(reply["caption"]), **known}


def _parsed(text: str) -> dict[str, Any]:
    if len(text) > LONGEST:
        raise Misfit(f"the reply has {len(text):,} characters, more than {LONGEST:,}")
    try:
        reply = json.loads(spoken(text), object_pairs_hook=_once, parse_constant=_no_constant)
    except Misfit:
        raise
    except (ValueError, RecursionError) as error:
        where = f"at character {error.pos}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise Misfit(f"not a JSON object ({where})") from None
    if not isinstance(reply, dict):
        raise Misfit(f"not a JSON object but {_kind(reply)}")
    return reply


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Misfit("a key stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise Misfit(f"{name} is no JSON value")


def _caption(value: Any) -> str:
    if not isinstance(value, str):
        raise Misfit(f"caption is {_kind(value)}, not text")
    text = " ".join(value.split())
    if not SHORTEST <= len(text) <= MAX_TEXT:
        raise Misfit(f"caption has {len(text):,} characters; it needs {SHORTEST} to {MAX_TEXT:,}")
    if not text.isprintable():
        raise Misfit("caption holds characters that cannot be printed")
    return text


def _attributes(value: Any) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise Misfit(f"attributes is {_kind(value)}, not an object")
    if unknown := sorted(value.keys() - ATTRIBUTES.keys()):
        raise Misfit(f"attributes has the unknown name {', '.join(map(_shown, unknown[:3]))}")
    for name, stated in value.items():
        if stated is not None and not isinstance(stated, bool):
            raise Misfit(f"attributes.{name} is {_kind(stated)}; it is true, false or null")
    return {name: stated for name, stated in value.items() if stated is not None}


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    if value is None or (isinstance(value, str) and value in allowed):
        return value
    raise Misfit(f"{key} is {_shown(value)}; it is one of {', '.join(allowed)}, or null")


def _age(value: Any) -> float | None:
    if value is None:
        return None
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not 0 <= value <= OLDEST or value != int(value):
        raise Misfit(f"age is {_shown(value)}; it is a whole number of years from 0 to {OLDEST}, or null")
    return float(value)


def _kind(value: Any) -> str:
    kinds: Mapping[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 40 else text[:40] + "..."
