"""Many requests in one pass of the model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from facemllm.serve.language import Refused

MAX_WAITING = 256

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Batcher(Generic[Piece, Result]):
    """Runs `answer` on batches of at most `size` in a thread of its own; the event loop stays free for health checks.

    Nothing waits for a batch to fill: the thread takes what has gathered, so a lone request is answered at once and a
    crowd shares passes. `answer` returns, for each piece of work, a result or an exception. When more than
    `max_waiting` pieces would wait, new ones are refused with 503.
    """

    def __init__(
        self, answer: Callable[[Sequence[Piece]], Sequence[Result | Exception]], *, size: int, max_waiting: int
    ) -> None:
        self._answer, self._size, self._max_waiting = answer, size, max_waiting
        self._queue: deque[tuple[Piece, asyncio.Future[Result]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    async def submit(self, work: Sequence[Piece]) -> list[Result]:
        """Results of all pieces, in order. Raises Refused when too many wait, or the first piece's own exception."""
        if len(self._queue) + len(work) > self._max_waiting:
            raise Refused(503, "the server is busy; try again in a moment")
        loop = asyncio.get_running_loop()
        waiting: list[tuple[Piece, asyncio.Future[Result]]] = [(piece, loop.create_future()) for piece in work]
        self._queue.extend(waiting)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._drain())
        results = await asyncio.gather(*(future for _, future in waiting), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results  # type: ignore[return-value]

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(self._size, len(self._queue)))]
            try:
                results = await loop.run_in_executor(self._thread, self._answer, [piece for piece, _ in batch])
            except Exception as error:  # every waiting request must hear of it, whatever it is
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
