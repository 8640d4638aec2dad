"""OpenAI's `response_format`: a JSON schema read as questions, and their answers written as its object.

A property that is named as a task's item is answered as that item; any other needs an `enum`, or is true or false:
options that are scored by likelihood as answers to its description, or to the user's text. What else a schema may say
is refused, not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from facemllm import tasks
from facemllm.serve.doors.reading import read_text
from facemllm.serve.language import Answer, Limits, Question, Refused

_KNOWN = frozenset({"type", "enum", "const", "description", "title", "default", "$ref", "anyOf", "allOf"})
_OBJECT = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "title", "description", "$schema"}
)
_TYPES = ("string", "boolean", "number", "integer")
MOST_OPTIONS = 64
_MOST_TITLE = 500  # characters that are read


@dataclass(frozen=True)
class Property:
    """One property of the object: its name, the question it stands for, and how its answer is written."""

    name: str
    question: Question
    type: str
    nullable: bool
    options: tuple[Any, ...] = ()


def read_format(value: Any, text: str, served: Mapping[str, tasks.Task], limits: Limits) -> tuple[Property, ...]:
    """The properties that a `response_format` asks for, none if it asks for plain text. Raises Refused (400)."""
    match value:
        case None | {"type": "text"}:
            return ()
        case {"type": "json_schema", "json_schema": {"schema": Mapping() as schema}}:
            return _read_object(schema, text, served, limits)
    raise Refused(
        400, 'response_format: give {"type": "json_schema", "json_schema": {"name", "schema"}} or leave it out'
    )


def titles(value: Any) -> tuple[str, ...]:
    """Names and titles of a `response_format` that was read: they are shown to no model, but say what an answer will be
    taken for."""
    if not isinstance(value, Mapping) or "json_schema" not in value:
        return ()
    whole = value["json_schema"]
    schema, inner = whole["schema"], whole["schema"]["properties"].values()
    found = [whole.get("name"), *(one.get(key) for one in (schema, *inner) for key in ("title", "description"))]
    return tuple(text[:_MOST_TITLE] for text in found if isinstance(text, str))


def write_object(properties: Sequence[Property], answers: Sequence[Answer]) -> tuple[str, str | None]:
    """The object as JSON, and why there is none where a property without an answer may not be null."""
    values = {}
    for one, found in zip(properties, answers, strict=True):
        values[one.name] = value = _written(one, found)
        if value is None and not one.nullable:
            return "", f"{one.name}: {found.reason or found.text}"
    return json.dumps(values, ensure_ascii=False), None


def _read_object(
    schema: Mapping[str, Any], text: str, served: Mapping[str, tasks.Task], limits: Limits
) -> tuple[Property, ...]:
    where = "response_format.json_schema.schema"
    properties, definitions = schema.get("properties"), schema.get("$defs", {})
    if schema.get("type") != "object" or not isinstance(properties, Mapping) or not properties:
        raise Refused(400, f"{where} must be an object with properties")
    if unknown := sorted(set(schema) - _OBJECT):
        raise Refused(400, f"{where}: '{unknown[0][:40]}' is not supported")
    if len(properties) > limits.max_instances:
        raise Refused(400, f"{where} has {len(properties)} properties; this server takes {limits.max_instances}")
    items = _items(served)
    return tuple(
        _read_property(name, own, f"{where}.properties.{name[:40]}", definitions, text, items, limits)
        for name, own in properties.items()
    )


def _items(served: Mapping[str, tasks.Task]) -> dict[str, tasks.Question]:
    """Items by name; a task of one item is known by its own name, too."""
    found: dict[str, tasks.Question] = {}
    for task in served.values():
        questions = task.questions()
        for question in questions:
            found.setdefault(question.item, question)
        if len(questions) == 1:
            found.setdefault(task.name, questions[0])
    return found


def _read_property(
    name: str,
    schema: Any,
    where: str,
    definitions: Any,
    text: str,
    items: Mapping[str, tasks.Question],
    limits: Limits,
) -> Property:
    plain, nullable = _resolved(schema, where, definitions)
    options = plain["enum"] if "enum" in plain else [plain["const"]] if "const" in plain else None
    kind = plain.get("type", "string")
    if kind not in _TYPES:
        raise Refused(400, f"{where}: type '{str(kind)[:40]}' is not supported; there are {', '.join(_TYPES)}")
    known = items.get(name)
    if options is not None:
        if not isinstance(options, list) or not 1 <= len(options) <= MOST_OPTIONS:
            raise Refused(400, f"{where}.enum must be a list of 1 to {MOST_OPTIONS} options")
        nullable, options = nullable or None in options, [one for one in options if one is not None]
        if not options or not all(isinstance(one, str | int | float) for one in options):
            raise Refused(400, f"{where}.enum must hold texts, numbers, true and false alone")
        for one in options:
            read_text(str(one), f"{where}.enum", limits)
    if known and (options is None or set(options) <= _said(known)):
        if _misfits(known, kind, options):
            raise Refused(400, f"{where}: {known.item} is no {kind}; it is answered by {_named(known)}")
        return Property(name, Question(task=known.task, item=known.item), kind, nullable, tuple(options or ()))
    if options is None and kind == "boolean":
        options = [True, False]
    if options is None:
        raise Refused(400, f"{where}: needs an enum, or the name of an item that GET /tasks lists")
    asked = read_text(plain["description"], f"{where}.description", limits) if "description" in plain else text
    words = tuple(_words(one) for one in options)
    return Property(name, Question(asked, options=words), kind, nullable, tuple(options))


def _resolved(schema: Any, where: str, definitions: Any, depth: int = 0) -> tuple[dict[str, Any], bool]:
    """A property's schema without references and null, and whether it may be null."""
    if not isinstance(schema, Mapping) or depth > 4:
        raise Refused(400, f"{where} must be a schema that refers to none that refers to others")
    if unknown := sorted(set(schema) - _KNOWN):
        raise Refused(400, f"{where}: '{unknown[0][:40]}' is not supported; there are {', '.join(sorted(_KNOWN))}")
    plain = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf", "allOf")}
    nullable, kind = False, plain.get("type")
    if isinstance(kind, list):
        nullable, left = "null" in kind, [one for one in kind if one != "null"]
        if len(left) != 1:
            raise Refused(400, f"{where}.type must be one type, or one and null")
        plain["type"] = left[0]
    inner: list[Any] = []
    if "$ref" in schema:
        name = str(schema["$ref"]).removeprefix("#/$defs/")
        if not isinstance(definitions, Mapping) or name not in definitions:
            raise Refused(400, f"{where}: $ref must be '#/$defs/NAME' of this schema")
        inner = [definitions[name]]
    for key in ("anyOf", "allOf"):
        if key in schema:
            inner += schema[key] if isinstance(schema[key], list) else [None]
    left = [one for one in inner if one != {"type": "null"}]
    nullable |= len(left) < len(inner)
    if len(left) > 1:
        raise Refused(400, f"{where}: a choice of schemas is not supported, except with null")
    for one in left:
        own, may = _resolved(one, where, definitions, depth + 1)
        plain, nullable = {**own, **plain}, nullable or may
    return plain, nullable


def _said(known: tasks.Question) -> set[Any]:
    """What an item's answer may be called: its values, or their words."""
    names = {name for option in known.options for name in (option.value, option.text)}
    return names | ({True, False} if known.form == "boolean" else set())


def _misfits(known: tasks.Question, kind: str, options: Sequence[Any] | None) -> bool:
    if kind == "boolean":
        return known.form != "boolean"
    return kind != "string" and (known.form != "number" or options is not None)


def _named(known: tasks.Question) -> str:
    return "a number" if known.form == "number" else "yes or no" if known.form == "boolean" else "a text"


def _words(option: Any) -> str:
    return {True: "yes", False: "no"}[option] if isinstance(option, bool) else str(option)


def _written(one: Property, found: Answer) -> Any:
    """A property's value; None where there is no answer."""
    if found.kind not in ("taught", "free"):
        return None
    if found.task is None or found.item is None:
        return one.options[[_words(option) for option in one.options].index(found.text)]
    if one.options:
        return _likeliest(one, found)
    if one.type == "boolean":
        return found.value == "yes"
    if one.type in ("number", "integer"):
        return round(float(found.value)) if one.type == "integer" else float(found.value)
    return found.text


def _likeliest(one: Property, found: Answer) -> Any:
    """The likeliest of some of an item's options, called as the schema calls it."""
    assert found.task is not None
    assert found.item is not None
    values = {option.text: option.value for option in tasks.get(found.task).question(found.item).options}
    scores = found.scores or {}
    return max(one.options, key=lambda option: scores.get(values.get(str(option), _words(option)), 0.0))
