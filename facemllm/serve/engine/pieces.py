"""An answer in pieces: what of an unfinished text can be sent already, and the sending of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

_HELD_BACK = 24  # most characters of an unfinished word


def settled(text: str) -> str:
    """An unfinished text but for its last word, which may still change."""
    return text[: max(text.rfind(" "), text.rfind("\n"), len(text) - _HELD_BACK, 0)]


Pieces = asyncio.Queue[str | None]
"""Pieces of an answer; None ends it."""


async def streamed(work: Coroutine[Any, Any, object], pieces: Pieces) -> AsyncGenerator[str, None]:
    """The pieces that `work` puts, then what it raises. Whoever leaves early ends the work, and is told of nothing:
    close it (`contextlib.aclosing`)."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda _: pieces.put_nowait(None))
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        await task
    finally:
        task.cancel()
        await asyncio.wait([task])
