"""What a rule of the gate answers: one shape for all of them, as data and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

Check = dict[str, Any]
State = Literal["failed", "loosened", "near", "passed"]
NEAR = 0.02
"""A rule without an interval is near its limit within this share of it."""
_ORDER: tuple[State, ...] = ("failed", "loosened", "near", "passed")


def check(
    kind: str,
    key: str,
    passed: bool,
    reason: str,
    *,
    setting: str | None = None,
    value: Any = None,
    limit: Any = None,
    low: float | None = None,
    high: float | None = None,
    **more: Any,
) -> Check:
    """A rule's answer: its `kind`, what it is about (`key`), whether it `passed` and the `reason` in words; what these
    are made of, `value`, 95 % interval (`low`, `high`) and `limit`; the name of the `setting` that holds the limit."""
    figures = {"value": value, "low": low, "high": high, "limit": limit, "setting": setting}
    return {"kind": kind, "key": key, "passed": passed, "reason": reason, **figures, **more}


def number(value: Any) -> float | None:
    """A figure that can be judged; None for what is missing, undefined, beyond all bounds or no number."""
    try:
        sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return None
    return value if sound else None


def rules(bundle: Mapping[str, Any]) -> list[tuple[State, Check]]:
    """Every rule that a bundle's gate was asked, what matters first: failed, met by a loosened limit, near the limit,
    passed. A bundle may come from a stranger: what has no sense there is left out."""
    gate = bundle.get("gate")
    loosened = [row.get("key") for row in _objects(bundle.get("loosened"))]
    checks = _objects(gate.get("checks")) if isinstance(gate, dict) else []
    found = [(_state(row, row.get("change") == "loosened" or row.get("setting") in loosened), row) for row in checks]
    return sorted(found, key=lambda one: _ORDER.index(one[0]))


def _objects(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _state(row: Check, loosened: bool) -> State:
    if row.get("passed") is not True:
        return "failed"
    if loosened:
        return "loosened"
    value, low, high, limit = (number(row.get(name)) for name in ("value", "low", "high", "limit"))
    if limit is None:
        return "passed"
    return "near" if _close(row.get("kind") == "fairness", value, low, high, limit) else "passed"


def _close(gap: bool, value: float | None, low: float | None, high: float | None, limit: float) -> bool:
    """Whether the figure's uncertainty reaches the limit; of a gap, whose sign says only who is first, either way."""
    if low is not None and high is not None:
        return max(abs(low), abs(high)) >= limit if gap else low <= limit <= high
    return value is not None and abs(value - limit) <= NEAR * abs(limit)
