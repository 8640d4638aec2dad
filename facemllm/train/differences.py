"""What differs between two settings, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 5) -> str:
    """What differs between two nested mappings in words: `plan.steps: 60 -> 80, seed: 0 -> 1`."""
    before, after = _flat(old), _flat(new)
    found = [
        f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    rest = [f"and {len(found) - limit} more"] if len(found) > limit else []
    return ", ".join(found[:limit] + rest) or "what differs was not kept"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
