"""Git as an object store: no work tree, no index, no hooks, none of the user's configuration; every object that is read
is hashed again. Only fetching and pushing see the user's configuration, since logins live there.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from facemllm.core import git
from facemllm.core.files import partial_folder, publish
from facemllm.errors import UserError
from facemllm.signing.canonical import Refused

BRANCH = "decisions"
"""The branch all is kept on: not the one that a plain repository has checked out, to which git lets nobody push."""
REF = f"refs/heads/{BRANCH}"
Kind = Literal["blob", "tree", "commit"]
_FIXED = {
    **{"core.hooksPath": "/dev/null", "core.commitGraph": "false", "core.fsmonitor": "false", "core.pager": "cat"},
    **{"core.fsync": "committed", "gc.auto": "0", "maintenance.auto": "false", "protocol.ext.allow": "never"},
    **{"fetch.recurseSubmodules": "false", "fetch.prune": "false", "fetch.fsckObjects": "false"},
    **{"push.gpgSign": "false", "push.followTags": "false"},
}
_WAIT_S = 120
AHEAD = 32
"""Objects that are asked for at once; their names fit into one page of a pipe, so that neither side waits for ever."""


class Git:
    """A repository, bare or with a work tree (which is left alone)."""

    def __init__(self, folder: Path):
        inner = folder / ".git"
        self.folder = inner if inner.is_dir() else folder
        self._reader: Objects | None = None

    def exists(self) -> bool:
        """Whether the repository is there. Raises UserError when something else is."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return False
        if not (self.folder / "HEAD").is_file() or not (self.folder / "objects").is_dir():
            raise UserError(
                f"{self.folder}: no git repository; promote.decisions names one, or a folder yet to be made"
            )
        if (self.folder / "shallow").exists():
            raise Refused(
                "history", f"{self.folder}: a shallow copy, which lacks history; `git fetch --unshallow` there"
            )
        return True

    def create(self) -> None:
        """Make the repository, bare, whole or not at all. Raises UserError if it cannot be written."""
        if self.folder.is_dir():
            self.folder.rmdir()  # `exists` found it empty
        partial = partial_folder(self.folder)
        Git(partial)._run("init", "--quiet", "--bare", "--template=", f"--initial-branch={BRANCH}", str(partial))
        publish(partial, self.folder)

    def head(self) -> str | None:
        """The newest commit, or None."""
        return self._run("rev-parse", "--verify", "--quiet", REF, allowed=(0, 1)).decode().strip() or None

    def chain(self, head: str) -> list[str]:
        """The commits up to `head` along first parents, oldest first; whether that is true, their objects tell."""
        try:
            return self._run("rev-list", "--first-parent", "--reverse", head, "--").decode().split()
        except UserError as error:
            raise Refused("history", f"{error}; fetch it from another copy") from None

    def objects(self) -> Objects:
        """A reader of objects; one process for all of them, which ends with this object."""
        if self._reader is None or not self._reader.alive():
            self._reader = Objects(self.folder, self._command("cat-file", "--batch"), self._environment())
        return self._reader

    def write(self, kind: Kind, data: bytes) -> str:
        """Add an object. Returns its name."""
        return self._run("hash-object", "-w", "-t", kind, "--stdin", data=data).decode().strip()

    def move(self, new: str, old: str | None) -> bool:
        """Set the branch from commit `old` (None: there is none) to `new`; False when it stands elsewhere by now."""
        before = old or "0" * len(new)
        try:
            self._run("update-ref", "--no-deref", REF, new, before)
        except UserError:
            if self.head() != old:
                return False
            raise
        return True

    def fetch(self, address: str) -> None:
        """Bring the branch of the repository at `address`, whatever it holds. Raises UserError if out of reach."""
        options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--prune", "--refmap=")
        self._run("fetch", *options, "--", address, f"+{REF}*:{REF}*", users=True)

    def push(self, address: str, commit: str) -> bool:
        """Put a commit on the branch at `address`; False when that holds others by now. Raises UserError."""
        try:
            self._run("push", "--quiet", "--no-verify", "--", address, f"{commit}:{REF}", users=True)
        except UserError as error:
            raced = ("non-fast-forward", "fetch first", "cannot lock ref", "failed to update ref", "stale info")
            if any(word in str(error) for word in raced):
                return False
            raise
        return True

    def _run(
        self, *arguments: str, data: bytes | None = None, allowed: tuple[int, ...] = (0,), users: bool = False
    ) -> bytes:
        place = arguments[-2] if users else self.folder
        why = "decisions are kept with it"
        done = git.run(self._command(*arguments), self._environment(users), why, data or b"", _WAIT_S, place)
        if done.returncode not in allowed:
            lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if "rejected]" in line or line.startswith(("fatal:", "error:", "remote:"))]
            raise UserError(
                f"git {arguments[0]} failed in {self.folder}: {' '.join(' '.join(errors or lines)[:500].split())}"
            )
        return done.stdout

    def _command(self, *arguments: str) -> list[str]:
        fixed = [part for key, value in _FIXED.items() for part in ("-c", f"{key}={value}")]
        return ["git", f"--git-dir={self.folder}", *fixed, *arguments]

    def _environment(self, users: bool = False) -> dict[str, str]:
        kept = git.environment(GIT_NO_REPLACE_OBJECTS="1", GIT_NO_LAZY_FETCH="1")
        kept |= {"GIT_GRAFT_FILE": os.devnull, "GIT_OPTIONAL_LOCKS": "0"}
        return kept if users else kept | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


class Objects:
    """Reads objects by name and hashes what it read."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str]):
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=none, bufsize=0)
        assert process.stdin is not None
        assert process.stdout is not None
        self._folder, self._process, self._pid = folder, process, os.getpid()
        self._ask, self._answer, self._buffer = process.stdin, process.stdout, bytearray()
        self._poll = select.poll()
        self._poll.register(self._answer, select.POLLIN)
        self._lock = threading.Lock()
        self.stop = weakref.finalize(self, _stop, process, os.getpid())

    def alive(self) -> bool:
        """Whether it can be asked: not after an error, nor in a process that was forked off."""
        return self.stop.alive and self._pid == os.getpid() and self._process.poll() is None

    def read(self, name: str, kind: Kind, largest: int) -> bytes | None:
        """The content of an object; None where it is larger than `largest` bytes.

        Raises Refused ("history") when it is missing, damaged or of another kind.
        """
        return self.read_all([name], kind, largest)[0]

    def read_all(self, names: Sequence[str], kind: Kind, largest: int) -> list[bytes | None]:
        """As `read`, of at most `AHEAD` objects, which git looks up while those before are hashed here."""
        assert len(names) <= AHEAD
        with self._lock:
            try:
                with suppress(OSError):  # where git ended, there is no answer
                    self._ask.write(b"".join(b"%s\n" % name.encode() for name in names))
                return [self._read(name, kind, largest) for name in names]
            except BaseException:  # what is left of the answer would be taken for the next
                self.stop()
                raise

    def _read(self, name: str, kind: Kind, largest: int) -> bytes | None:
        until = time.monotonic() + _WAIT_S
        while (end := self._buffer.find(b"\n")) < 0:
            self._receive(name, until)
        header = self._taken(end + 1).split()
        if len(header) != 3 or header[1] != kind.encode():
            raise self._damaged(name)
        size = int(header[2])
        hashed = hashlib.new("sha1" if len(name) == 40 else "sha256", b"%s %d\0" % (header[1], size))
        content, left = bytearray(), size
        while left:
            if not self._buffer:
                self._receive(name, until)
            block = self._taken(left)
            hashed.update(block)
            left -= len(block)
            if size <= largest:
                content += block
        while not self._buffer:
            self._receive(name, until)
        self._taken(1)
        if hashed.hexdigest() != name:
            raise self._damaged(name)
        return bytes(content) if size <= largest else None

    def _taken(self, most: int) -> bytes:
        block = bytes(self._buffer[:most])
        del self._buffer[:most]
        return block

    def _receive(self, name: str, until: float) -> None:
        """Wait for more of git's answer. Raises Refused when none comes: a pipe in place of an object never ends."""
        ready = self._poll.poll(1000 * max(0.0, until - time.monotonic()))
        block = os.read(self._answer.fileno(), 1 << 18) if ready else b""
        if not block:
            raise self._damaged(name)
        self._buffer += block

    def _damaged(self, name: str) -> Refused:
        return Refused(
            "history", f"{self._folder}: object {name[:12]} is missing or damaged; fetch it from another copy"
        )


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():
        process.kill()
        process.communicate()
