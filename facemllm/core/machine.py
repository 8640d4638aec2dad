"""This machine as a process sees it: its cores, its tie to the process that started it, work in several processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

import psutil

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 2  # jobs a process beside the one it is at
_TICK_S = 0.5


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies, even by SIGKILL (Linux; elsewhere a no-op)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def die_with(pid: int) -> None:
    """End this process within half a second of another one's end, also where a shell stands between the two."""

    def watch() -> None:
        while psutil.pid_exists(pid):
            time.sleep(_TICK_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name=f"ends-with-{pid}", daemon=True).start()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """`work(job)` for every job, in their order. Jobs are pulled only a few ahead of the results that were taken.

    `work` and jobs travel by pickling. Closing the iterator early ends the processes. With one worker all is done here.
    Processes, not threads: picture work goes in and out of Python dozens of times a picture, and threads that wait for
    each other at every turn are slower than one of them.
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
