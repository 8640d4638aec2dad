"""Who is at work in a home: two processes never make the same result at once, and nothing in use is removed.

A step at work holds the claim `work/.<key>.lock`, whose text says which step it is, on what, and whose process. It is a
flock, so it ends with its holder, even killed, and the next one goes on from what that left. `use.lock` is shared for
the moment in which results are taken into use, and held alone by what removes some (`facemllm gc`, `facemllm forget`).

flock holds between machines on NFS 4, CephFS, EFS, and Lustre mounted with `flock`; not on SMB or on buckets mounted as
folders. There a second machine may do the same work once more, which harms nothing (`facemllm.core.store`), and what is
taken into use is protected by its age alone: `facemllm gc` touches nothing that was used within its grace period.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from facemllm.core import progress
from facemllm.core.files import locked, writing
from facemllm.errors import UserError

NAME = 32  # characters of a key that name its work
_TICK_S, _TELL_S = 0.02, 2.0


@dataclass(frozen=True)
class Claim:
    """A step at work: the name of its folder under `work`, the step, what it was given, its process."""

    name: str
    step: str
    inputs: tuple[str, ...]
    process: str

    def __str__(self) -> str:
        return f"{self.step} ({self.process})"


@contextmanager
def claim(home: Path, key: str, step: str, inputs: Mapping[str, str]) -> Iterator[None]:
    """Be the one that works under a key, with its inputs in use; says so, and waits, while another process is."""
    process = f"process {os.getpid()} on {socket.gethostname()}"
    note = json.dumps({"step": step, "inputs": sorted(set(inputs.values())), "process": process})

    def waiting(holder: str) -> None:
        who = _parsed(key, holder).process
        progress.event(note=f"waiting for {who}, which makes the same result")

    with locked(_lock(home, key), note=note, waiting=waiting):
        use(home, inputs.values())
        yield


def use(home: Path, results: Iterable[str]) -> bool:
    """Take results into use: as old as now, so that nothing removes them soon. Whether all of them are there."""
    with _flock(home / "use.lock", fcntl.LOCK_SH):
        paths = [home / "store" / one for one in results if one and Path(one).name == one]  # "passed" is an input, too
        for path in paths:
            with suppress(OSError):
                os.utime(path)
        return all(path.is_dir() for path in paths)


@contextmanager
def removing(home: Path) -> Iterator[None]:
    """Let nobody take a result into use meanwhile: for moments."""
    with _flock(home / "use.lock", fcntl.LOCK_EX):
        yield


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Let no step work meanwhile. Raises UserError while one does."""
    with removing(home):
        if found := claims(home):
            raise UserError(f"{found[0]} is at work in {home}; wait for it, or stop it, and try again")
        yield


def claims(home: Path) -> list[Claim]:
    """The steps at work in a home."""
    found = []
    for path in sorted((home / "work").glob(".*.lock")):
        if held(path):
            with suppress(OSError):
                found.append(_parsed(path.name[1:-5], path.read_text("utf-8")))
    return found


def held(path: Path) -> bool:
    """Whether somebody holds a lock file now; one left by a killed process is held by nobody."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock(home: Path, key: str) -> Path:
    return home / "work" / f".{key[:NAME]}.lock"


def _parsed(name: str, note: str) -> Claim:
    try:
        data = json.loads(note)
        return Claim(name[:NAME], str(data["step"]), tuple(map(str, data["inputs"])), str(data["process"]))
    except (ValueError, TypeError, KeyError):  # it has only just been taken
        return Claim(name[:NAME], "a step", (), "another process")


@contextmanager
def _flock(path: Path, how: int) -> Iterator[None]:
    """Hold a lock file that stays. Who only shares a home that cannot be written goes without: nothing is removed."""
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except UserError:
        if how == fcntl.LOCK_EX:
            raise
        yield
        return
    try:
        tell = time.monotonic() + _TELL_S
        while True:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if tell and time.monotonic() > tell:
                    progress.event(note=f"waiting for what removes results in {path.parent} (lock {path})")
                    tell = 0.0
                time.sleep(_TICK_S)
            except OSError as error:  # a file system without flock
                if how == fcntl.LOCK_EX:
                    raise UserError(f"{path} cannot be locked ({error.strerror}); do it where it can be") from None
                break
        yield
    finally:
        os.close(descriptor)
