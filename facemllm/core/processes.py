"""Process trees: who is alive, ending a tree politely, and a supervisor that keeps one server running.

A process is named by its id *and* its start, so a recycled id is never mistaken for ours. Members of a server are found
three ways, because each fails somewhere: as descendants (lost when a parent dies), by the session the supervisor opened
(kept by Ray's daemons and MLflow's worker), and by a token in the environment (kept across sessions, but overwritten by
programs that change their title). `python -m facemllm.core.processes SPEC.json` is the supervisor; it imports only the
standard library and psutil, so that it weighs 20 MB and starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

TOKEN = "FACEMLLM_SERVICE"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_TICK_S = 0.2
_HEALTHY_AGAIN_S = 60.0


@dataclass(frozen=True)
class Identity:
    """One process: its id, and its start in seconds after boot (which, unlike clock time, never shifts)."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The process that has this id now. Raises psutil.NoSuchProcess."""
        created = psutil.Process(pid).create_time()
        return cls(pid, round(created - psutil.boot_time(), 2))

    def process(self) -> psutil.Process | None:
        """The running process, or None if it ended (a zombie has ended) or its id belongs to another one now."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - psutil.boot_time() - self.started) < 0.05
            if same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


@dataclass(frozen=True)
class Spec:
    """What a supervisor runs, in its own environment, and how it watches it: all `health` URLs must answer 200."""

    name: str
    command: tuple[str, ...]
    health: tuple[str, ...]
    record: str
    token: str
    digest: str
    port: int
    url: str
    restart: bool
    start_timeout_s: float
    check_every_s: float = 5.0
    failures: int = 4
    grace_s: float = 10.0

    @classmethod
    def read(cls, path: Path) -> Spec:
        """The specification in a JSON file."""
        data = json.loads(path.read_text("utf-8"))
        return cls(**{**data, "command": tuple(data["command"]), "health": tuple(data["health"])})


@dataclass(frozen=True)
class Record:
    """What is known about a started server: enough to adopt it, or to end every process it left.

    `answered` tells that it answered at least once: from then on its supervisor brings it back when it fails.
    """

    name: str
    supervisor: Identity
    child: Identity | None
    token: str
    digest: str
    port: int
    url: str
    since: float
    restarts: int
    boot: str
    health: tuple[str, ...]
    answered: bool = False

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record in a JSON file, or None if there is none that can be read."""
        try:
            data = json.loads(path.read_text("utf-8"))
            child = Identity(**data["child"]) if data["child"] else None
            parsed = {"supervisor": Identity(**data["supervisor"]), "child": child, "health": tuple(data["health"])}
            return cls(**{**data, **parsed})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=2))

    def members(self) -> list[psutil.Process]:
        """Every living process of this server, its supervisor included, wherever its parents went."""
        if self.boot != boot_id():
            return []
        found: dict[int, psutil.Process] = {}
        for identity in (self.supervisor, self.child):
            if identity and (process := identity.process()):
                found[process.pid] = process
                found |= {p.pid: p for p in descendants(process)}
        for process in psutil.process_iter():
            if process.pid not in found and self._owns(process):
                found[process.pid] = process
        return list(found.values())

    def _owns(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if environment.get(TOKEN) == self.token:
                return process.status() != psutil.STATUS_ZOMBIE
            # A program that set its own title (Ray's workers) has overwritten its environment: go by the session.
            started = process.create_time() - psutil.boot_time()
            same_session = os.getsid(process.pid) == self.supervisor.pid and started >= self.supervisor.started
            return not environment and same_session and process.status() != psutil.STATUS_ZOMBIE
        return False


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def boot_id() -> str:
    """A name for the time since the machine started; empty where the system has none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return ""


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """Children, their children and so on; empty once the process is gone."""
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def end(processes: Iterable[psutil.Process], grace_s: float = 3.0) -> None:
    """Ask the processes to end, wait up to the grace, and kill what is left. Returns when none is left."""
    alive = list(processes)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(alive, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=grace_s)


def end_tree(pid: int, grace_s: float = 10.0) -> None:
    """End a process and everything below it: the root first, so that it can end its children in good order.

    Whatever is still there after the grace (or at once, when the root has gone) is asked, then killed. A process that
    does not exist is no error.
    """
    try:
        root = psutil.Process(pid)
        tree = {p.pid: p for p in descendants(root)}
        root.terminate()
    except psutil.NoSuchProcess:
        return
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        tree |= {p.pid: p for p in descendants(root)}
        psutil.wait_procs([root], timeout=_TICK_S)
    end([root, *tree.values()], min(3.0, grace_s))


def healthy(urls: Sequence[str], timeout_s: float = 5.0) -> bool:
    """True if every URL answers 200 in time. Proxies of the environment are not used."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        for url in urls:
            with opener.open(url, timeout=timeout_s) as answer:
                if answer.status != 200:
                    return False
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return False
    return True


class Supervisor:
    """Runs one server: restarts it with back-off when it dies or stops answering, ends its whole tree on SIGTERM.

    A server that ends before it ever answered is not tried again: something is wrong that trying cannot mend.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.stopping = threading.Event()
        me = Identity.of(os.getpid())
        self.record = Record(
            name=spec.name,
            supervisor=me,
            child=None,
            token=spec.token,
            digest=spec.digest,
            port=spec.port,
            url=spec.url,
            since=time.time(),
            restarts=0,
            boot=boot_id(),
            health=spec.health,
        )

    def run(self) -> int:
        """Supervise until asked to stop; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stopping.set())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server become our children, so they stay in our tree
        self.record.write(Path(self.spec.record))
        pause, code = 1.0, 0
        while not self.stopping.is_set():
            started = time.monotonic()
            child = self._start()
            self._watch(child)
            code = child.poll() or 0
            end_tree(child.pid, self.spec.grace_s)
            child.wait()
            self._end_rest()
            if self.stopping.is_set() or not self.spec.restart or not self.record.answered:
                break
            pause = 1.0 if time.monotonic() - started > _HEALTHY_AGAIN_S else min(pause * 2, 30.0)
            self._say(f"ended with {code}; starting again in {pause:.0f} s")
            self.stopping.wait(pause)
            self.record = replace(self.record, restarts=self.record.restarts + 1)
        if not self.stopping.is_set():
            self._say(f"ended with {code}; not started again")
            return code or 1
        Path(self.spec.record).unlink(missing_ok=True)
        return 0

    def _start(self) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        child = subprocess.Popen(
            self.spec.command,
            env={**os.environ, TOKEN: self.spec.token},
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: _die_with(parent),
        )
        self.record = replace(self.record, child=Identity.of(child.pid))
        self.record.write(Path(self.spec.record))
        return child

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        """Return when the server has ended, has failed its checks, or shall stop."""
        answered, failed, next_check = False, 0, 0.0
        deadline = time.monotonic() + self.spec.start_timeout_s
        while child.poll() is None and not self.stopping.wait(_TICK_S):
            if time.monotonic() < next_check:
                continue
            if healthy(self.spec.health, min(5.0, self.spec.check_every_s)):
                if not self.record.answered:
                    self.record = replace(self.record, answered=True)
                    self.record.write(Path(self.spec.record))
                answered, failed = True, 0
            elif answered:
                failed += 1
            elif time.monotonic() > deadline:
                self._say(f"no answer within {self.spec.start_timeout_s:.0f} s")
                return
            if failed >= self.spec.failures and self.spec.restart:
                self._say(f"failed {failed} health checks")
                return
            next_check = time.monotonic() + (self.spec.check_every_s if answered else _TICK_S)

    def _end_rest(self) -> None:
        end([p for p in self.record.members() if p.pid != os.getpid()])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%F %T')} supervisor of {self.spec.name}: {text}", flush=True)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent was gone before the kernel was told
        os._exit(1)


if __name__ == "__main__":
    sys.exit(Supervisor(Spec.read(Path(sys.argv[1]))).run())
