"""Replies of models, kept for good: one row a reply, in the SQLite database `storage.home/annotations/replies.sqlite`.

A reply is named by its content key: the digest of the picture's `image_id`, the words asked, the model and its
parameters. What was asked once is read from here ever after, whichever table, run or process asks. A reply is kept as
it came, fit or not, so a row whose reply and repair do not fit is refused again without being paid for again. When a
reply came and what it cost then stand here and not in the table: a job that was killed and one that was not have to
give the same table.

The same database holds the accounts: what a job has asked for and used up, ever, in counters that all its processes
share. An account is named by model, words and parameters, so it outlives any process that is killed. Before a request
goes out it is reserved, together with as many tokens as it may use; afterwards the reservation is settled with what the
answer says it used, in one transaction with the reply; its tokens are given back when the endpoint refused it. A
reservation whose outcome nobody learns (the answer did not come, the process died) stays charged: it may have been paid
for. So requests never exceed `max_requests`, nor tokens `max_tokens`, as long as a request uses no more than
`most_tokens` says; the largest prompt seen corrects that bound, since how many tokens a picture is worth is the model's
secret until it answers.

While a request is under way nobody else asks the same. One whose process died may be asked again and is counted as in
doubt; under the same `Idempotency-Key`, which endpoints that know the header answer once. Processes of one machine
share the database (write-ahead log); those of several must not: they ask who has it open (`Kept`). What is committed
outlives a killed process; a reply, a power cut, too.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

from facemllm.asking.requests import JobStopped, MakeRequest, Reply, Request, RowRefused, Sender
from facemllm.core.processes import Identity

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


class Kept(Protocol):
    """Replies that are kept: the database (`Replies`), or who has it open for other machines."""

    def read(self, image_id: str, key: str) -> Reply | None:
        """As `Replies.read`."""

    def write(self, reply: Reply) -> None:
        """As `Replies.write`."""

    def close(self) -> None:
        """Let go of it."""


Opening = Callable[[], Kept]
"""Opens replies that are kept. It may travel to other processes by pickling."""


def replies(
    opening: Opening, sender: Sender, wanted: Sequence[tuple[str, str, MakeRequest]]
) -> list[Reply | Exception]:
    """A reply, or why there is none, for each that is wanted: an image_id, a key, and how the request is made if it is
    needed. What was answered before is read where it is kept; the same question is put once. Raises JobStopped when no
    request can be answered now."""
    found: dict[str, Reply | Exception] = {}
    missing: dict[str, MakeRequest] = {}
    with closing(opening()) as store:
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


@dataclass(frozen=True)
class Counters:
    """Sums over all jobs of an account. `requests` went out; `answered` of them were, and are paid for;
    `refused` ones came back with an error, unpaid. `repairs` and `retries` are requests, too. `in_doubt`
    ones were sent, and no answer came or was stored. `unmetered` answers do not say what they used. `held` are tokens
    of requests that are under way, in doubt, or unmetered. `largest` is the largest prompt so far, in tokens."""

    requests: int = 0
    answered: int = 0
    refused: int = 0
    repairs: int = 0
    retries: int = 0
    in_doubt: int = 0
    unmetered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    held: int = 0
    largest: int = 0

    @property
    def tokens(self) -> int:
        """Tokens used, or perhaps used."""
        return self.prompt_tokens + self.completion_tokens + self.held

    def plus(self, **counts: int) -> Counters:
        """With these added, by name."""
        return replace(self, **{name: getattr(self, name) + count for name, count in counts.items()})

    def less(self, before: Counters) -> Counters:
        """What has been added since `before`."""
        return self.plus(**{name: -count for name, count in asdict(before).items()})


@dataclass(frozen=True)
class Reserved:
    """A request that may go out, and the tokens that are held for it."""

    key: str
    tokens: int


@dataclass(frozen=True)
class Wait:
    """A request that may not go out. `limit` is the setting that does not allow it; without one, another process has
    the same request under way."""

    limit: str = ""


class Account:
    """The counters of one account in the store of replies, shared with every other process."""

    def __init__(self, replies: Replies, name: str) -> None:
        self.replies, self.name = replies, name

    def read(self) -> Counters:
        """The counters now."""
        with self.replies.transaction() as database:
            return self._read(database)

    def reserve(
        self, request: Request, most: tuple[int, int], max_requests: int | None, max_tokens: int | None
    ) -> Reserved | Wait | Reply:
        """Set a request aside that may use so many tokens in its prompt and in its completion, if the budget allows it
        and nobody has it under way; or its reply, which another process may have stored by now."""
        with self.replies.transaction() as database:
            # in the same transaction: what was under way a moment ago may be answered
            if (stored := self.replies.read(request.image_id, request.key)) is not None:
                return stored
            now = self._read(database)
            found = database.execute("SELECT pid, started FROM under_way WHERE key = ?", (request.key,)).fetchone()
            if found is not None and Identity(*found).process() is not None:
                return Wait()
            tokens = max(most[0], now.largest) + most[1]
            if max_requests is not None and now.requests + 1 > max_requests:
                return Wait("max_requests")
            if max_tokens is not None and now.tokens + tokens > max_tokens:
                return Wait("max_tokens")
            counts = {"requests": 1, "held": tokens, "repairs": int(request.repair), "in_doubt": int(found is not None)}
            self._write(database, now.plus(**counts))
            me = _identity(os.getpid())
            values = (request.key, request.image_id, me.pid, me.started)
            database.execute("INSERT OR REPLACE INTO under_way VALUES (?, ?, ?, ?)", values)
            return Reserved(request.key, tokens)

    def answered(self, reserved: Reserved, reply: Reply) -> bool:
        """Keep the reply to a reserved request, which used so many tokens; unknown ones stay held. False, and it is not
        kept, when its picture was forgotten meanwhile."""
        prompt, completion = reply.prompt_tokens, reply.completion_tokens
        counts = {"answered": 1, "unmetered": 1}
        if prompt is not None and completion is not None:
            counts = {"answered": 1, "prompt_tokens": prompt, "completion_tokens": completion, "held": -reserved.tokens}
        with self.replies.transaction(durable=True) as database:
            now = self._read(database).plus(**counts)
            self._write(database, replace(now, largest=max(now.largest, prompt or 0)))
            wanted = self._ended(database, reserved)
            if wanted:
                self.replies.write(reply)
        return wanted

    def unanswered(self, reserved: Reserved, in_doubt: bool, sent: bool = True) -> None:
        """A reserved request got no reply. If that is not in doubt, it is not paid for, and its tokens are given back;
        so is the request itself if it was not `sent`."""
        counts = (
            {"in_doubt": 1}
            if in_doubt
            else {"held": -reserved.tokens, **({"refused": 1} if sent else {"requests": -1})}
        )
        with self.replies.transaction() as database:
            self._write(database, self._read(database).plus(**counts))
            self._ended(database, reserved)

    def count(self, **counts: int) -> None:
        """Add to the counters, by name."""
        with self.replies.transaction() as database:
            self._write(database, self._read(database).plus(**counts))

    def form(self, base_url: str) -> int | None:
        """Which form of requests the endpoint at this address is known to understand."""
        with self.replies.transaction() as database:
            found = database.execute("SELECT form FROM accounts WHERE name = ?", (self.name,)).fetchone()
        return json.loads(found[0] or "{}").get(base_url) if found else None

    def remember_form(self, base_url: str, form: int) -> None:
        """Know from now on which form it understands."""
        with self.replies.transaction() as database:
            self._write(database, self._read(database))
            known = json.dumps({base_url: form})
            database.execute("UPDATE accounts SET form = ? WHERE name = ?", (known, self.name))

    def _read(self, database: sqlite3.Connection) -> Counters:
        found = database.execute("SELECT counters FROM accounts WHERE name = ?", (self.name,)).fetchone()
        return Counters(**json.loads(found[0])) if found else Counters()

    def _write(self, database: sqlite3.Connection, counters: Counters) -> None:
        added = "INSERT INTO accounts (name, counters) VALUES (?, ?)"
        changed = "ON CONFLICT DO UPDATE SET counters = excluded.counters"
        database.execute(f"{added} {changed}", (self.name, json.dumps(asdict(counters))))

    def _ended(self, database: sqlite3.Connection, reserved: Reserved) -> bool:
        return database.execute("DELETE FROM under_way WHERE key = ?", (reserved.key,)).rowcount > 0


_identity: Callable[[int], Identity] = cache(Identity.of)


def most_tokens(text: str, image_side: int, pictures: int = 1) -> int:
    """More tokens than a prompt with pictures should use: one for two bytes of text, one for 14 x 14 pixels."""
    return len(text.encode()) // 2 + pictures * (-(-image_side // 14)) ** 2
