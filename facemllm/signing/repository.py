"""The git repository behind the decisions: read as it is, verified to have only grown, and added to."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from facemllm.core.digests import of_bytes
from facemllm.core.files import locked
from facemllm.errors import UserError, one_line
from facemllm.settings import is_address
from facemllm.signing.canonical import Refused, utc_now
from facemllm.signing.checkpoint import Checkpoint
from facemllm.signing.git import AHEAD, Git
from facemllm.signing.history import MEND, History, grown

_TRIES = 50


class Repository:
    """A repository at a path or address, as it was when last read. `history` is what it holds.

    `stale` says in one line that the address could not be reached, so that what is read is the copy of last time.
    """

    def __init__(self, place: str | Path, checkpoint: Path | None, clones: Path | None):
        self.address = place if isinstance(place, str) and is_address(place) else None
        if self.address is not None:
            if clones is None or self.address.startswith("-"):
                raise UserError(f"{place}: a repository at an address needs a folder for its copy; give a path")
            place = clones / f"{of_bytes(self.address.encode())[:16]}.git"
        self.stale: str | None = None
        self.history = History()
        self._checkpoint = Checkpoint(checkpoint)
        self._git = Git(Path(place).absolute())
        self._lock = threading.RLock()

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return self.address or str(self._git.folder)

    def refresh(self) -> None:
        """Read on to what is there now. Raises Refused ("history") naming the first commit that does more than add."""
        with self._lock:
            self.history = self._read_on(self.history)

    def verify(self, now: datetime) -> None:
        """Read all of it anew, from the first commit on, and `check` it. Raises Refused ("history", "clock")."""
        with self._lock:
            before = self.history.head
            found = self._read_on(History())
            if before is not None and before not in found.commits:
                raise self._gone(before)
            self.history = found
        self.check(now)

    def check(self, now: datetime) -> None:
        """Compare what was read with the checkpoint and the clock. Raises Refused ("history", "clock")."""
        newest = self.history.changes[-1].committed_at if self.history.changes else None
        self._checkpoint.check(self.place, self.history.commits, newest, now)

    def remember(self, now: datetime) -> None:
        """Write the checkpoint: the head that was read, and the newest time seen."""
        self._checkpoint.write(self.history.head, self.history.commits, now)

    def read(self, path: str, largest: int) -> bytes:
        """A file's content. Raises Refused ("too_large", or "history" where it is damaged)."""
        data = self._git.objects().read(self.history.files[path], "blob", largest)
        if data is None:
            raise Refused("too_large", f"{path}: larger than {largest} bytes")
        return data

    def read_all(self, paths: Sequence[str], largest: int) -> Iterator[tuple[str, bytes | None]]:
        """The contents of many files; None for one that is larger. Raises Refused ("history") for a damaged one."""
        for first in range(0, len(paths), AHEAD):
            some = paths[first : first + AHEAD]
            objects = [self.history.files[path] for path in some]
            yield from zip(some, self._git.objects().read_all(objects, "blob", largest), strict=True)

    def add(
        self,
        files: Mapping[str, bytes],
        message: str,
        author: str,
        proof: str,
        *,
        exact: bool = False,
        at_any_time: bool = False,
    ) -> None:
        """Add files in one commit, unless the path `proof` is there; tried again where others were faster.

        Raises UserError if it cannot be written or pushed, or if what is there has to be `exact` and is not; Refused as
        `refresh`, and as `check` unless it may be added `at_any_time`.
        """
        with self._lock, locked(self._beside("append")):
            for attempt in range(_TRIES):
                if not self._git.exists():
                    self._git.create()
                self.refresh()
                if not at_any_time:
                    self.check(utc_now())
                if self.stale:
                    raise UserError(f"nothing was recorded: {self.stale}; try again when it is reachable")
                if proof in self.history.files:
                    if exact:
                        self._require_bytes(proof, files[proof])
                    return
                if self._commit(files, message, author):
                    self.refresh()
                    self.remember(utc_now())
                    return
                time.sleep(random.uniform(0, 0.05 * min(attempt + 1, 10)))
        raise UserError(f"{self.place}: others kept writing for {_TRIES} tries; nothing was recorded, try again")

    def _require_bytes(self, path: str, data: bytes) -> None:
        """Raises UserError where a path that is there holds other bytes: somebody without a key was faster."""
        if self.read(path, max(len(data), 1 << 20)) != data:
            raise UserError(
                f"{self.place}: somebody put other bytes at {path}; NOTHING WAS RECORDED: see who may write there, "
                "and sign again"
            )

    def _read_on(self, known: History) -> History:
        if self.address is not None:
            self._fetch(self.address)
        head = self._git.head() if self._git.exists() else None
        if head == known.head:
            return known
        chain = self._git.chain(head) if head else []
        if known.head is not None and known.head not in chain:
            raise self._gone(known.head)
        found = known.copy()
        found.extend(chain[chain.index(known.head) + 1 if known.head else 0 :], self._git.objects())
        return found

    def _gone(self, commit: str) -> Refused:
        return Refused("history", f"{self.place}: commit {commit} is gone, it was rewritten; {MEND}")

    def _fetch(self, address: str) -> None:
        with locked(self._beside("fetch")):
            if not self._git.exists():
                self._git.create()
            try:
                self._git.fetch(address)
                self.stale = None
            except UserError as error:
                if self._git.head() is None:
                    raise UserError(f"{address}: the decisions repository is out of reach; {one_line(error)}") from None
                self.stale = f"{address} is out of reach, decisions are those of the last time ({one_line(error, 200)})"

    def _commit(self, files: Mapping[str, bytes], message: str, author: str) -> bool:
        """Whether a commit of these files became the newest."""
        git, old = self._git, self.history
        blobs = {path: git.write("blob", data) for path, data in files.items()}
        tree = grown(git, old.tree, {tuple(path.encode().split(b"/")): one for path, one in blobs.items()})
        at = max(utc_now(), old.changes[-1].committed_at if old.changes else utc_now())
        name = re.sub(r"[<>\n\0]", " ", author).strip()
        who = f"{name} <facemllm@localhost> {int(at.timestamp())} +0000"
        parent = f"parent {old.head}\n" if old.head else ""
        commit = git.write("commit", f"tree {tree}\n{parent}author {who}\ncommitter {who}\n\n{message}\n".encode())
        if self.address is not None:
            return git.push(self.address, commit)
        return git.move(commit, old.head)

    def _beside(self, purpose: str) -> Path:
        return self._git.folder.with_name(f".{self._git.folder.name}.{purpose}.lock")
