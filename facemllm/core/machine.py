"""This machine as the project uses it: its loopback and cores, a path that every tool can read, work in processes."""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from ipaddress import ip_address
from itertools import islice
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import TypeVar

from facemllm.core.processes import die_with_parent
from facemllm.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 2  # jobs a process beside the one it is at


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own loopback, whoever is asked."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def cores() -> int:
    """Cores this process may use: those of its affinity (`taskset`, cpusets), at most what its cgroups' quota lets
    it use, rounded up, as Java and loky round it."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([mine, *(math.ceil(quota) for quota in _quotas())]))


def _quotas(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """CPU quotas, in cores, of this process's cgroup and of those above it: cgroup v2's `cpu.max`, v1's
    `cpu.cfs_quota_us`. Inside a container its own cgroup is the root of what can be seen."""
    with suppress(OSError):
        for line in own.read_text("utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = cgroups / controllers if controllers else cgroups
            path = PurePosixPath(name.lstrip("/"))
            for folder in (path, *path.parents):
                with suppress(OSError, ValueError):
                    if controllers:
                        parts = [(top / folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period")]
                    else:
                        parts = (top / folder / "cpu.max").read_text().split()
                    quota, period = (float(part) for part in parts)  # v2 says "max" and v1 -1 where there is none
                    if quota > 0:
                        yield quota / period


def own_folder() -> Path:
    """A folder with a short, plain path that is this user's alone, made if absent. Raises UserError if it is not."""
    folder = Path("/tmp") / f"facemllm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user; remove it, or ask who administers this machine")
    folder.chmod(0o700)  # Ray opens its own folder to everyone
    return folder


def short_name(path: Path) -> str:
    """Eight characters that stand for a path."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


def on_plain_path() -> None:
    """Start this command anew by a link to its environment where that environment's path is not plain.

    KFP's local runner and Ray write the interpreter's path into shell commands as it is, and MLflow's database
    migrations cannot read one with `%`. All children have the interpreter of this process.
    """
    if re.fullmatch(r"[\w./+@:,=-]*", sys.prefix, re.ASCII):
        return
    link = own_folder() / short_name(Path(sys.prefix))
    with suppress(FileExistsError):
        link.symlink_to(sys.prefix)
    python = str(link / Path(sys.executable).relative_to(sys.prefix))
    os.execv(python, [python, *sys.orig_argv[1:]])


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
