"""Replies of models, kept for good: one row a reply, in the SQLite database `storage.home/annotations/replies.sqlite`.

A reply is named by its content key: the digest of the picture's `image_id`, the words asked, the model and its
parameters. What was asked once is read from here ever after, whichever table, run or process asks. A reply is kept as
it came, fit or not, so a row whose reply and repair do not fit is refused again without being paid for again. When a
reply came and what it cost then stand here and not in the table: a job that was killed and one that was not have to
give the same table.

The same database holds the accounts of `budget.py` and which requests are under way. Processes of one machine share it
(write-ahead log); those of several must not. What is committed outlives a killed process; a reply, a power cut, too.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from facemllm.asking.requests import JobStopped, MakeRequest, Reply, RowRefused, Sender

_IMAGE_ID = re.compile(r"[0-9a-f]{64}")
_WAIT_S = 60.0  # for another process that writes, which takes milliseconds
_VERSION = 1
_TABLES = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS replies (image_id TEXT, key TEXT, reply TEXT NOT NULL, PRIMARY KEY (image_id, key))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS under_way (key TEXT PRIMARY KEY, image_id TEXT NOT NULL, pid INTEGER NOT NULL,
    started REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, counters TEXT NOT NULL, form TEXT) WITHOUT ROWID;
PRAGMA user_version={_VERSION};
COMMIT;
"""


class Replies:
    """The database under one `storage.home`; used by one thread at a time. Its methods raise JobStopped when the
    file cannot be read or written."""

    def __init__(self, home: Path) -> None:
        self.path = folder(home) / "replies.sqlite"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._in_one_line():
            self._database = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA secure_delete=ON")  # what is forgotten is overwritten
            if self._database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.executescript(_TABLES)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def read(self, image_id: str, key: str) -> Reply | None:
        """The reply of that key, or None."""
        with self._in_one_line():
            chosen = "SELECT reply FROM replies WHERE image_id = ? AND key = ?"
            found = self._database.execute(chosen, (image_id, key)).fetchone()
        return None if found is None else Reply(**json.loads(found[0]))

    def write(self, reply: Reply) -> None:
        """Keep a reply: on disk for good, whole or not at all. Raises ValueError when its image_id is none."""
        require_image_id(reply.image_id)
        with self.transaction(durable=True) as database:
            # as ASCII: half a surrogate pair, which a reply can hold, is no UTF-8
            values = (reply.image_id, reply.key, json.dumps(asdict(reply)))
            database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", values)

    @contextmanager
    def transaction(self, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All that the block writes, or nothing; no other process writes meanwhile. `durable`: it waits for the disk.
        One inside another is a part of it."""
        with self._in_one_line():
            if self._database.in_transaction:
                yield self._database
                return
            self._database.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    def forget(self, image_ids: Iterable[str]) -> int:
        """Remove every reply about these pictures; how many there were."""
        with self.transaction(durable=True) as database:
            removed = 0
            for image_id in image_ids:
                removed += database.execute("DELETE FROM replies WHERE image_id = ?", (image_id,)).rowcount
                database.execute("DELETE FROM under_way WHERE image_id = ?", (image_id,))
        with self._in_one_line():
            busy, *_ = self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise TimeoutError(f"{self.path.name} is being read, so that what was removed is still in its log")
        return removed

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise JobStopped(
                f"the store of replies {self.path} cannot be used ({error}); see to its disk, or move it away"
            ) from None


def replies(home: Path, sender: Sender, wanted: Sequence[tuple[str, str, MakeRequest]]) -> list[Reply | Exception]:
    """A reply, or why there is none, for each that is wanted: an image_id, a key, and how the request is made if it is
    needed. What was answered before comes from the store under `home`; the same question is put once.

    Raises JobStopped when no request can be answered now.
    """
    found: dict[str, Reply | Exception] = {}
    missing: dict[str, MakeRequest] = {}
    with closing(Replies(home)) as store:
        for image_id, key, make in wanted:
            if key in found or key in missing:
                continue
            try:
                require_image_id(image_id)
            except ValueError as error:
                found[key] = RowRefused(str(error))
                continue
            stored = store.read(image_id, key)
            if stored is None:
                missing[key] = make
            else:
                found[key] = stored
    if missing:
        found |= zip(missing, sender.send(list(missing.values())), strict=True)
    return [found[key] for _, key, _ in wanted]


def purge(home: Path, image_ids: Iterable[str]) -> int:
    """Remove every reply about these pictures for good; how many there were. A reply that is under way is not stored
    when it comes. Raises TimeoutError while another process keeps the removed bytes in the database's log."""
    if not (folder(home) / "replies.sqlite").exists():
        return 0
    with closing(Replies(home)) as store:
        return store.forget(image_ids)


def price(
    prompt_tokens: int | None, completion_tokens: int | None, input_price: float | None, output_price: float | None
) -> float | None:
    """What tokens cost at prices per million; None when a price is not known. Uncounted tokens are free."""
    if input_price is None or output_price is None:
        return None
    return ((prompt_tokens or 0) * input_price + (completion_tokens or 0) * output_price) / 1e6


def require_image_id(image_id: str) -> None:
    """Raises ValueError when that is no image_id."""
    if not _IMAGE_ID.fullmatch(image_id):
        raise ValueError(f"image_id {image_id[:80]!r} is no SHA-256")


def folder(home: Path) -> Path:
    """The folder of this room under `storage.home`."""
    return home / "annotations"
