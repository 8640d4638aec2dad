"""What the API server of Kubernetes does to objects: patches, server-side apply, selectors; and how it refuses."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

Body = dict[str, Any]
Path = tuple[str, ...]


class Refused(Exception):
    """An answer that is no success: its status, Kubernetes' reason, its message, and what the message is about."""

    def __init__(self, status: int, reason: str, message: str, details: Body | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.details = status, reason, details or {}


def merged(before: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386), applied."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    out = dict(before) if isinstance(before, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key), value)
    return out


def operated(before: Body, operations: list[Body]) -> Body:
    """A JSON patch (RFC 6902) of the operations test, add, replace and remove, applied."""
    out = copy.deepcopy(before)
    for one in operations:
        *path, last = (part.replace("~1", "/").replace("~0", "~") for part in one["path"].split("/")[1:])
        node: Any = out
        try:
            for part in path:
                node = node[int(part)] if isinstance(node, list) else node[part]
            at: Any = (len(node) if last == "-" else int(last)) if isinstance(node, list) else last
            if one["op"] == "test" and node[at] != one["value"]:
                raise Refused(422, "Invalid", f"the server rejected our request: testing path {one['path']} failed")
            if one["op"] == "remove" or (one["op"] == "replace" and isinstance(node, list)):
                del node[at]
            if one["op"] in ("add", "replace"):
                node.insert(at, one["value"]) if isinstance(node, list) else node.update({at: one["value"]})
        except (KeyError, IndexError, ValueError):
            raise Refused(422, "Invalid", f"the server rejected our request: no {one['path']} to {one['op']}") from None
    return out


def leaves(value: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every field of an object that holds no further object, by its path; a list is one field."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*at, key))
    else:
        yield at, value


def at_path(body: Any, path: Path) -> Any:
    """A field of an object; None where there is none."""
    for part in path:
        body = body.get(part) if isinstance(body, Mapping) else None
    return body


def claimed(body: Body) -> dict[Path, Any]:
    """The fields that whoever writes an object is the manager of, and their values."""
    named = {("metadata", "name"), ("metadata", "namespace"), ("apiVersion",), ("kind",)}
    return {path: value for path, value in leaves(body) if path not in named and path[0] != "status"}


def applied(before: Body | None, body: Body, owners: dict[Path, str], manager: str, force: bool) -> Body:
    """Server-side apply: merged, unless another manager has set a field otherwise; fields given up are removed.
    `owners`, the manager of each field, is brought up to date."""
    fields = claimed(body)
    conflicts = {
        path: owners[path]
        for path, value in fields.items()
        if path in owners and owners[path] != manager and at_path(before, path) != value
    }
    if conflicts and not force:
        listed = "; ".join(f'conflict with "{who}": .{".".join(path)}' for path, who in conflicts.items())
        raise Refused(409, "Conflict", f"Apply failed with {len(conflicts)} conflict(s): {listed}")
    out = merged(before or {}, body)
    for path in [path for path, who in owners.items() if who == manager and path not in fields]:
        del owners[path]
        parent = at_path(out, path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)
    owners |= dict.fromkeys(fields, manager)
    return out


def fits(body: Body, query: Mapping[str, str]) -> bool:
    """Whether an object is one of those that a label and a field selector choose."""
    labels, metadata = body["metadata"].get("labels", {}), body["metadata"]
    for one in filter(None, query.get("labelSelector", "").split(",")):
        name, differs, value = re.fullmatch(r"([^!=]+)(?:(!?)==?(.*))?", one).groups()  # type: ignore[union-attr]
        if value is None and name not in labels:
            return False
        if value is not None and (labels.get(name) == value) == bool(differs):
            return False
    for one in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = one.partition("=")
        if str(at_path({"metadata": metadata, **body}, tuple(path.split(".")))) != value:
            return False
    return True
