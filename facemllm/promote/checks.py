"""What a rule of the gate answers: one shape for all of them, as data and in words."""

from __future__ import annotations

import math
from typing import Any

Check = dict[str, Any]


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
    """A figure that can be judged; None for what is missing, undefined or no number."""
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if sound else None
