"""Work on a stream in several processes, results in the stream's order, memory flat.

Processes, not threads: picture work goes in and out of Python dozens of times a picture, and threads that wait for each
other at every turn are slower than one of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from facemllm.core.machine import die_with_parent

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 2  # jobs a process beside the one it is at


def ordered(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """`work(job)` for every job, in their order. Jobs are pulled only a few ahead of the results that were taken.

    `work` and jobs travel by pickling. Closing the iterator early ends the processes. With one worker all is done here.
    """
    if workers == 1:
        yield from map(work, jobs)
        return
    stream = iter(jobs)
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=die_with_parent) as pool:
        window = deque(pool.submit(work, job) for job in islice(stream, workers * AHEAD))
        try:
            while window:
                done = window.popleft().result()
                window.extend(pool.submit(work, job) for job in islice(stream, 1))
                yield done
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
