"""Options of readers that are numbers: empty means the default."""

from __future__ import annotations

from collections.abc import Mapping

from facemllm.errors import UserError


def whole(options: Mapping[str, str], name: str, default: int, low: int = 1) -> int:
    """A whole number from `low` up. Raises UserError."""
    text = options.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= low):
        raise UserError(f"option {name} is {text!r}; give a whole number from {low} up")
    return int(text)


def share(options: Mapping[str, str], name: str, default: float) -> float:
    """A number from 0 to 1. Raises UserError."""
    text = options.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"option {name} is {text!r}; give a number from 0 to 1")
    return value
