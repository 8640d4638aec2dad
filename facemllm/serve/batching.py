"""Micro-batching: questions that wait while the model is busy are answered together.

Nothing waits for a batch to fill: the model's one thread takes what has gathered, so a lone request is answered at once
and a crowd shares passes. The event loop never runs the model and stays free for health checks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from facemllm.serve.policy import Refused

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Waiting(Generic[Work, Result]):
    work: Work
    future: asyncio.Future[Result]


class Batcher(Generic[Work, Result]):
    """Runs `answer` on batches of at most `size` in a thread of its own.

    `answer` returns, for each piece of work, a result or an exception. When more than `max_waiting` pieces would wait,
    new ones are refused with 503.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Work]], Sequence[Result | Exception]],
        *,
        size: int,
        max_waiting: int,
    ) -> None:
        self._answer, self._size, self._max_waiting = answer, size, max_waiting
        self._queue: deque[_Waiting[Work, Result]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    async def submit(self, work: Sequence[Work]) -> list[Result]:
        """Results of all pieces, in order. Raises Refused when too many wait, or the first piece's own exception."""
        if len(self._queue) + len(work) > self._max_waiting:
            raise Refused(503, "the server is busy; try again in a moment")
        loop = asyncio.get_running_loop()
        waiting = [_Waiting[Work, Result](piece, loop.create_future()) for piece in work]
        self._queue.extend(waiting)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._drain())
        results = await asyncio.gather(*(one.future for one in waiting), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results  # type: ignore[return-value]

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(self._size, len(self._queue)))]
            try:
                results = await loop.run_in_executor(self._thread, self._answer, [one.work for one in batch])
            except Exception as error:  # every waiting request must hear of it, whatever it is
                results = [error] * len(batch)
            for one, result in zip(batch, results, strict=True):
                if one.future.done():
                    continue
                if isinstance(result, Exception):
                    one.future.set_exception(result)
                else:
                    one.future.set_result(result)
