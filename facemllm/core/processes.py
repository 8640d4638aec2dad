"""Processes: trees of them (who is alive, ending one politely), ties between them, and a server's supervisor.

A process is named by its id *and* its start, so a recycled id is never mistaken for ours. Members of a server are found
three ways, because each fails somewhere: as descendants (lost when a parent dies), by the session the supervisor opened
(kept by Ray's daemons and MLflow's worker), and by a token in the environment (kept across sessions, but overwritten by
programs that change their title). `python -m facemllm.core.processes RECORD.json` is the supervisor of what the record
names; it imports little, so that it weighs 20 MB and starts at once.
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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from facemllm.core.files import atomic_write

TOKEN = "FACEMLLM_SERVICE"
_TICK_S, _WATCH_S = 0.2, 0.5
_HEALTHY_AGAIN_S = 60.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


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
class Service:
    """One server as data: what to run, where it answers, how to tell that it does, and what its clients need.

    All `health` URLs must answer 200; a server that fails them is restarted. Those in `ready` are asked for its status
    only. `env` is the server's, `client_env` its clients'. `folder` is made if absent.
    """

    name: str
    command: tuple[str, ...]
    port: int
    url: str
    health: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    client_env: dict[str, str] = field(default_factory=dict)
    restart: bool = True
    folder: str = ""
    any_interface: bool = False
    ready: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """A server, and what is known about its run: enough to adopt it, or to end every process it left.

    It is written before the supervisor is started, which adds itself and its child. `answered` tells that the server
    answered at least once: from then on its supervisor brings it back when it fails.
    """

    service: Service
    token: str
    boot: str
    since: float
    start_timeout_s: float
    supervisor: Identity | None = None
    child: Identity | None = None
    restarts: int = 0
    answered: bool = False
    check_every_s: float = 5.0
    failures: int = 4
    grace_s: float = 10.0

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record in a JSON file, or None if there is none that can be read."""
        try:
            data = json.loads(path.read_text("utf-8"))
            service: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["service"].items()}
            who = {name: data[name] and Identity(**data[name]) for name in ("supervisor", "child")}
            return cls(**{**data, **who, "service": Service(**service)})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        atomic_write(path, json.dumps(asdict(self), indent=2).encode())

    def supervised(self) -> psutil.Process | None:
        """The supervisor, if it lives."""
        return self.supervisor.process() if self.supervisor else None

    def members(self) -> list[psutil.Process]:
        """Every living process of this server, its supervisor included, wherever its parents went."""
        if self.boot != boot_id():
            return []
        found: dict[int, psutil.Process] = {}
        for identity in (self.supervisor, self.child):
            if identity and (process := identity.process()):
                found |= {p.pid: p for p in (process, *descendants(process))}
        for process in psutil.process_iter():
            if process.pid not in found and self._owns(process):
                found[process.pid] = process
        return list(found.values())

    def _owns(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if environment := process.environ():
                return environment.get(TOKEN) == self.token
            # A program that set its own title (Ray's workers) has overwritten its environment: go by the session.
            if self.supervisor and os.getsid(process.pid) == self.supervisor.pid:
                return process.create_time() - psutil.boot_time() >= self.supervisor.started
        return False


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
    """Ask the processes to end, wait up to the grace, and kill what is left."""
    alive = list(processes)
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.Error):
                ask(process)
        _, alive = psutil.wait_procs(alive, timeout=grace_s)


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


def trouble(urls: Sequence[str], timeout_s: float = 5.0) -> str:
    """Why a server is not healthy: the first URL that does not answer 200 in time, and what came instead; "" if none.

    Proxies of the environment are not used.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for url in urls:
        try:
            with opener.open(url, timeout=timeout_s) as answer:
                if answer.status != 200:
                    return f"{url} answers {answer.status}"
        except urllib.error.HTTPError as error:
            return f"{url} answers {error.code}"
        except (http.client.HTTPException, OSError, ValueError) as error:
            return f"{url}: {getattr(error, 'reason', error) or type(error).__name__}"
    return ""


def interrupted_by_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C does, also where a shell's background has it ignore SIGINT."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def die_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Ask the kernel to send this process a signal when its parent dies, even by SIGKILL (Linux; elsewhere a no-op).

    `parent` says who that was: if it is gone already, this process ends at once.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def die_with(pid: int) -> None:
    """End this process within half a second of another one's end, also where a shell stands between the two."""

    def watch() -> None:
        while psutil.pid_exists(pid):
            time.sleep(_WATCH_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name=f"ends-with-{pid}", daemon=True).start()


class Supervisor:
    """Runs one server: restarts it with back-off when it dies or stops answering, ends its whole tree on SIGTERM.

    A server that ends before it ever answered is not tried again: something is wrong that trying cannot mend.
    """

    def __init__(self, path: Path, record: Record) -> None:
        self.path, self.record = path, record
        self.stopping = threading.Event()

    def run(self) -> int:
        """Supervise until asked to stop; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stopping.set())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what its children leave behind stays in its tree (Linux)
        self._note(supervisor=Identity.of(os.getpid()))
        pause, code = 1.0, 0
        while not self.stopping.is_set():
            started = time.monotonic()
            child = self._start()
            self._watch(child)
            code = child.poll() or 0
            end_tree(child.pid, self.record.grace_s)
            child.wait()
            end([p for p in self.record.members() if p.pid != os.getpid()])
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if self.stopping.is_set() or not self.record.service.restart or not self.record.answered:
                break
            pause = 1.0 if time.monotonic() - started > _HEALTHY_AGAIN_S else min(pause * 2, 30.0)
            self._say(f"ended with {code}; starting again in {pause:.0f} s")
            self.stopping.wait(pause)
            self.record = replace(self.record, restarts=self.record.restarts + 1)
        if not self.stopping.is_set():
            self._say(f"ended with {code}; not started again")
            return code or 1
        self.path.unlink(missing_ok=True)
        return 0

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            self.record.service.command,
            stdin=subprocess.DEVNULL,
            cwd=self.record.service.folder or None,
            # bound before the fork, and told its parent: that may be gone before the kernel is asked
            preexec_fn=partial(die_with_parent, signal.SIGTERM, os.getpid()),
        )
        self._note(child=Identity.of(child.pid))
        return child

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        """Return when the server has ended, has failed its checks, or shall stop."""
        record, answered, failed, next_check = self.record, False, 0, 0.0
        deadline = time.monotonic() + record.start_timeout_s
        while child.poll() is None and not self.stopping.wait(_TICK_S):
            if time.monotonic() < next_check:
                continue
            why = trouble(record.service.health, min(5.0, record.check_every_s))
            if not why:
                if not self.record.answered:
                    self._note(answered=True)
                answered, failed = True, 0
            elif answered:
                failed += 1
            elif time.monotonic() > deadline:
                return self._say(f"no answer within {record.start_timeout_s:.0f} s")
            if failed >= record.failures and record.service.restart:
                return self._say(f"failed {failed} health checks: {why}")
            next_check = time.monotonic() + (record.check_every_s if answered else _TICK_S)
        return None

    def _note(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        self.record.write(self.path)

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%F %T')} supervisor of {self.record.service.name}: {text}", flush=True)


if __name__ == "__main__":
    record = Record.read(Path(sys.argv[1]))
    sys.exit(Supervisor(Path(sys.argv[1]), record).run() if record else "no record to read")
