"""Pictures are decoded beside the event loop and the model's thread: a few at once, within a time, each one once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facemllm.serve.guard.images import crop, decode, decode_map
from facemllm.serve.language import Encoded, Refused

if TYPE_CHECKING:
    from facemllm.serve.engine.protocol import Prepared

WAITING_A_THREAD = 32
"""Pictures that may wait for each thread; more are refused at once."""
_OBJECT_BYTES = 1024  # what a kept picture takes beside its arrays

Box = tuple[float, ...]
Key = tuple[str, ...]


@dataclass
class _Job:
    """A picture that is decoded, whether that has begun, and for how many requests."""

    future: asyncio.Future[Prepared]
    begun: threading.Event
    waiting: int = 0


class Decoder:
    """Makes prepared pictures of checked ones.

    `prepare` gets the upright image, its map or None (both cropped to the box, if one was given), and the key under
    which the result is kept: digests of image and map, and the box. It runs in one of `threads` threads. A request
    waits `seconds` at most, and decoding stops then, too. The pictures used last are kept, up to `cache` bytes;
    requests that ask for the same picture at once have it decoded once. For use in one event loop.
    """

    def __init__(
        self,
        prepare: Callable[[Image.Image, NDArray[np.uint8] | None, Key], Prepared],
        *,
        threads: int,
        seconds: float,
        cache: int,
    ) -> None:
        self._prepare, self._seconds, self._most_bytes = prepare, seconds, cache
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._most_jobs = threads * (1 + WAITING_A_THREAD)
        self._jobs: dict[Key, _Job] = {}
        self._kept: OrderedDict[Key, Prepared] = OrderedDict()
        self.kept_bytes = 0

    async def prepared(self, image: Encoded, map: Encoded | None, box: Box | None) -> Prepared:
        """The prepared picture. Raises Refused: 400 and 422 for the picture, 429 if it is not decoded in time."""
        key = (image.digest, map.digest if map else "", repr(box) if box else "")
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return found
        job = self._jobs.get(key) or self._start(key, image, map, box)
        job.waiting += 1
        try:
            return await asyncio.wait_for(asyncio.shield(job.future), self._seconds)
        except TimeoutError:
            if job.begun.is_set():
                raise Refused(422, "the image cannot be read: decoding it takes too long") from None
            raise self._busy() from None
        finally:
            job.waiting -= 1
            if not job.waiting:
                job.future.cancel()  # nobody waits for it: if it has not begun, it never does
                if self._jobs.get(key) is job:
                    del self._jobs[key]

    def _start(self, key: Key, image: Encoded, map: Encoded | None, box: Box | None) -> _Job:
        if len(self._jobs) >= self._most_jobs:
            raise self._busy()
        begun = threading.Event()

        def work() -> Prepared:
            begun.set()
            return self._made(key, image, map, box, time.monotonic() + self._seconds)

        job = _Job(asyncio.wrap_future(self._threads.submit(work)), begun)
        job.future.add_done_callback(lambda future: self._keep(key, future))
        self._jobs[key] = job
        return job

    def _made(self, key: Key, image: Encoded, map: Encoded | None, box: Box | None, deadline: float) -> Prepared:
        picture = decode(image, deadline)
        classes_HW = decode_map(map, picture, deadline) if map else None
        if box:
            picture, classes_HW = crop(picture, classes_HW, box)
        return self._prepare(picture, classes_HW, key)

    def _keep(self, key: Key, future: asyncio.Future[Prepared]) -> None:
        if future.cancelled() or future.exception():
            return
        self._kept[key] = future.result()
        self.kept_bytes += _bytes(future.result())
        while self.kept_bytes > self._most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.kept_bytes -= _bytes(oldest)

    def _busy(self) -> Refused:
        return Refused(429, "too many images wait to be decoded; try again in a moment", retry_after=1)

    def close(self) -> None:
        """End the threads; what waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _bytes(kept: Prepared) -> int:
    return _OBJECT_BYTES + kept.pixels.nbytes + (kept.map.nbytes if kept.map is not None else 0)
