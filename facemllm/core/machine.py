"""This machine as a process sees it: its cores, and its tie to the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

import psutil

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
