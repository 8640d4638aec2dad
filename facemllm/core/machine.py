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
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_TICK_S = 0.5


def die_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Ask the kernel to send this process a signal when its parent dies, even by SIGKILL (Linux; elsewhere a no-op).

    `parent` says who that was: if it is gone already, this process ends at once.
    """
    prctl(_PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Make what this process's children leave behind its own children, so that it stays in its tree (Linux)."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def prctl(option: int, value: int) -> None:
    """Linux's `prctl(2)`; elsewhere a no-op."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


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
