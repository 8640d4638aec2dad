"""Mappings of settings: read from YAML, laid over each other, changed by `a.b=value`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from facemllm.errors import UserError


class _Unique(yaml.SafeLoader):
    """YAML as PyYAML reads it safely, but a mapping that says the same key twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                problem = f"'{key.value}' stands there twice, first in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, name: str = "") -> Any:
    """What a YAML file holds. Raises UserError with file and line where it is no YAML, or says a key twice; OSError."""
    try:
        return yaml.load(path.read_text("utf-8"), _Unique)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{name or path}{where}: not valid YAML; {getattr(error, 'problem', error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name or path}: not UTF-8 text; convert it to UTF-8") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, empty where it holds nothing. Raises UserError for anything else."""
    data = read_yaml(path, path.name)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path.name}: expected a mapping of settings, found {type(data).__name__}")
    return data


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it: mappings merge, anything else is replaced. Neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def empties(base: Any, over: Any) -> bool:
    """Whether `over` lays an empty mapping over one that is not, at any depth."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return False
    return bool(base and not over) or any(empties(base.get(key), value) for key, value in over.items())


def leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every key at every depth, as `a.b.c`, sections before what is in them."""
    keys = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        keys.append(path)
        if isinstance(value, Mapping):
            keys += leaves(value, f"{path}.")
    return keys


def parse_override(text: str, values: Any) -> tuple[list[str], Any]:
    """The parts of the key of `a.b=value`, and the value, in YAML. A name that holds a dot is known among `values`, or
    stands in quotes. Raises UserError where it is no such text."""
    key, found, raw = text.partition("=")
    parts = [quoted or plain for quoted, plain in re.findall(r'"([^"]+)"|([^."]+)', key.strip())]
    if not found or re.sub(r'"[^"]+"|[^."]+', "-", key.strip()) != ".".join("-" * len(parts)) or not parts:
        raise UserError(f"--set {text}: expected KEY=VALUE, as in --set train.workers=2")
    at = 0
    while at < len(parts):
        known = values if isinstance(values, Mapping) else {}
        ends = range(len(parts), at + 1, -1)
        end = next((end for end in ends if ".".join(parts[at:end]) in known), at + 1)
        parts[at:end] = [".".join(parts[at:end])]
        values, at = known.get(parts[at]), at + 1
    try:
        return parts, yaml.load(raw, _Unique)
    except yaml.YAMLError as error:
        problem = f"; {error.problem}" if isinstance(error, yaml.constructor.ConstructorError) else ""
        raise UserError(f"--set {text}: the value is not valid YAML{problem}") from None
