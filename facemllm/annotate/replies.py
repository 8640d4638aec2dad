"""The form of a model's reply: one JSON object with a caption and labels, under a schema made from the tasks.

`schema()` is what an endpoint is asked to keep to, in the strict dialect of JSON Schema that OpenAI-compatible servers
take: every key required, nothing besides. `read` checks a reply against the same vocabulary, whoever wrote it; the one
licence is that an attribute that is left out is unknown, as one that is null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from facemllm.tasks import attributes, expression, gender
from facemllm.tasks.items import Choice
from facemllm.tasks.language import MAX_TEXT

KEYS = ("caption", "attributes", "expression", "age", "gender")
SHORTEST = 20  # characters of a caption
OLDEST = 120  # years
LONGEST = 64_000  # characters of a reply
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", re.DOTALL)


class Misfit(ValueError):
    """A reply that does not fit; the message says what is wrong with it, in words that its writer can act on."""


@cache
def attribute_names() -> tuple[str, ...]:
    """Every attribute that the tasks ask about, in their order."""
    names: list[str] = []
    for item in attributes.TASK.items:
        names += [option.value for option in item.options] if isinstance(item, Choice) else [item.name]
    return tuple(names)


@cache
def expressions() -> tuple[str, ...]:
    """The expressions that the task knows."""
    return tuple(option.value for option in expression.TASK.items[0].options)


@cache
def genders() -> tuple[str, ...]:
    """The genders that the task knows."""
    return tuple(option.value for option in gender.TASK.items[0].options)


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a reply."""
    names = attribute_names()
    known = {
        "caption": {"type": "string", "description": "two to five sentences about what can be seen"},
        "attributes": {
            "type": "object",
            "properties": {name: {"type": ["boolean", "null"]} for name in names},
            "required": list(names),
            "additionalProperties": False,
        },
        "expression": {"type": ["string", "null"], "enum": [*expressions(), None]},
        "age": {"type": ["integer", "null"], "description": f"years, 0 to {OLDEST}"},
        "gender": {"type": ["string", "null"], "enum": [*genders(), None]},
    }
    return {"type": "object", "properties": known, "required": list(KEYS), "additionalProperties": False}


def read(text: str) -> dict[str, Any]:
    """Caption and labels from a reply: `caption`, and of the labels those that are known (`attributes` as a mapping).

    Raises Misfit saying what does not fit.
    """
    reply = _parsed(text)
    if missing := [key for key in KEYS if key not in reply]:
        raise Misfit(f"the key {', '.join(missing)} is missing")
    if unknown := sorted(reply.keys() - set(KEYS)):
        raise Misfit(f"unknown key {', '.join(map(_shown, unknown[:3]))}; the keys are {', '.join(KEYS)}")
    labels = {
        "attributes": _attributes(reply["attributes"]),
        "expression": _one_of("expression", reply["expression"], expressions()),
        "age": _age(reply["age"]),
        "gender": _one_of("gender", reply["gender"], genders()),
    }
    known = {key: value for key, value in labels.items() if value not in (None, {})}
    return {"caption": _caption(reply["caption"]), **known}


def _parsed(text: str) -> dict[str, Any]:
    if len(text) > LONGEST:
        raise Misfit(f"the reply has {len(text):,} characters, more than {LONGEST:,}")
    if fenced := _FENCE.fullmatch(text):
        text = fenced.group(1)
    try:
        reply = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
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
    if unknown := sorted(value.keys() - set(attribute_names())):
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
