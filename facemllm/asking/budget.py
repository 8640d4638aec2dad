"""What a job has asked for and used up, ever: counters that all its processes share, and the strict budget over them.

An account is named by model, words and parameters, and its counters stand in the database of the replies, so they
outlive any process that is killed. Before a request goes out it is reserved, together with as many tokens as it may
use; afterwards the reservation is settled with what the answer says it used, in one transaction with the reply, or
given back when the endpoint refused the request. A reservation whose outcome nobody learns (the answer did not come,
the process died) stays charged: it may have been paid for. So requests never exceed `max_requests`, nor tokens
`max_tokens`, as long as a request uses no more than `most_tokens` says; the largest prompt seen corrects that bound,
since how many tokens a picture is worth is the model's secret until it answers.

While a request is under way nobody else asks the same. One whose process died may be asked again and is counted as in
doubt; under the same `Idempotency-Key`, which endpoints that know the header answer once.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

from facemllm.asking.requests import Reply, Request
from facemllm.asking.store import Replies
from facemllm.core.processes import Identity


@dataclass(frozen=True)
class Counters:
    """Sums over all jobs of an account.

    `requests` went out and may have been paid for; `answered` of them were; `refused` ones came back with an error and
    are not among them. `repairs` and `retries` are requests, too. `in_doubt` ones were sent, and no answer came or was
    stored. `unmetered` answers do not say what they used. `held` are tokens of requests that are under way, in doubt,
    or unmetered. `largest` is the largest prompt so far, in tokens.
    """

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
        """Keep the reply to a reserved request, which used so many tokens; unknown ones stay held.

        False, and it is not kept, when its picture was forgotten meanwhile.
        """
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

    def unanswered(self, reserved: Reserved, in_doubt: bool) -> None:
        """A reserved request got no reply. If that is not in doubt, it is not paid for and given back."""
        counts = {"in_doubt": 1} if in_doubt else {"requests": -1, "held": -reserved.tokens, "refused": 1}
        with self.replies.transaction() as database:
            self._write(database, self._read(database).plus(**counts))
            self._ended(database, reserved)

    def retried(self) -> None:
        """A request is made once more."""
        with self.replies.transaction() as database:
            self._write(database, self._read(database).plus(retries=1))

    def form(self, base_url: str) -> int | None:
        """Which form of requests the endpoint at this address is known to understand."""
        with self.replies.transaction() as database:
            found = database.execute("SELECT form FROM accounts WHERE name = ?", (self.name,)).fetchone()
        known = json.loads(found[0] or "{}") if found else {}
        return known.get(base_url)

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


def most_tokens(text: str, image_side: int) -> int:
    """More tokens than a prompt with a picture should use: one for two bytes of text, one for 14 x 14 pixels."""
    return len(text.encode()) // 2 + (-(-image_side // 14)) ** 2
