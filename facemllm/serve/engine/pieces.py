"""What of an unfinished text can be told already."""

from __future__ import annotations

_HELD_BACK = 24  # most characters of an unfinished word


def settled(text: str) -> str:
    """An unfinished text but for its last word, which may still change."""
    return text[: max(text.rfind(" "), text.rfind("\n"), len(text) - _HELD_BACK, 0)]
