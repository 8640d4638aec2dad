"""How much an engine takes, what it has, and what it did: the same for every engine."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from facemllm.serve.language import Refused

if TYPE_CHECKING:
    from facemllm.model.inference import Query


class UnderWay(NamedTuple):
    """Requests that the server is at, whether the queue has them yet or not: all, those of the client who asks now, and
    of how many clients they are."""

    all: int = 0
    own: int = 0
    clients: int = 0


IDLE = UnderWay()
"""No request."""
_OPEN_COST = 4.0  # what an open question costs, in closed ones
_QUERY_CHARS = 8192  # most characters of a closed question and its options


def cost_of(closed: int, open_: int) -> float:
    """What so many questions about one face cost, in closed ones."""
    return max(1.0, closed + _OPEN_COST * open_)


def require_short(query: Query) -> None:
    """Raise Refused (413) for a closed question that is too long with its options."""
    if (size := len(query.question) + sum(map(len, query.options))) > _QUERY_CHARS:
        limit = f"this server takes {_QUERY_CHARS} characters"
        raise Refused(413, f"a question and its options have {size} characters; {limit}")


class Load(NamedTuple):
    """What is there already: jobs of the client, jobs in all, their cost, and the seconds that a job of the client
    would wait."""

    held: int
    jobs: int
    cost: float
    waits: float

    @classmethod
    def of(
        cls, held: int, jobs: int, running: int, clients: int, cost: float, pace: float | None, under_way: UnderWay
    ) -> Load:
        """The load of the jobs that are here, of so many clients, and of requests under way that are not: they cost
        what a job costs. Between two jobs of a client each other client is served one, so a job waits for as many
        rounds as its client has jobs, however few there are of others now."""
        here = jobs + running
        own, clients = max(held, under_way.own), max(clients, under_way.clients)
        before = (own + 1) * (clients + (own == 0)) - 1
        waits = before * (cost / here if here else 1.0) * (pace or 0.0)
        return cls(held, jobs + max(0, under_way.all - here), cost, waits)


@dataclass(frozen=True)
class Room:
    """How much the queue holds and a batch takes.

    `faces` and `questions` may wait in all, `client_faces` of one client wait or be computed. Where more than a batch
    waits, none is taken that would wait longer than `wait_s`, by the measured pace and its client's turn. A batch
    takes `batch` jobs; `rows` open questions are written at a time. `window_s` is waited for company, under load alone.
    """

    faces: int = 256
    questions: int = 2048
    client_faces: int = 128
    wait_s: float = 0.5
    batch: int = 16
    rows: int = 64
    window_s: float = 0.002

    def require(self, counters: Counters, load: Load, cost: float, deadline: float, crowd: int) -> None:
        """Raise Refused (429, counted) where a job of this cost finds no room. From `crowd` jobs on, none is let in
        that would wait longer than `wait_s`."""
        full = ""
        if load.held >= self.client_faces:
            full = f"{load.held} of your requests are waiting, as many as one client may have"
        elif load.jobs >= self.faces or (load.cost and load.cost + cost > self.questions):
            full = "the server is busy"
        elif (load.waits > self.wait_s and load.jobs >= crowd) or time.monotonic() + load.waits > deadline:
            full = "the server is too busy to answer in the time allowed"
        if full:
            counters.full += 1
            raise Refused(429, f"{full}; try again in a moment", max(1.0, load.waits))


@dataclass
class Counters:
    """What a scheduler did since it began, for metrics. Seconds are sums over jobs (`waiting_s`) and batches
    (`computing_s`); `sizes` counts batches by their number of new jobs."""

    waiting: int = 0
    running: int = 0
    taken: int = 0
    finished: int = 0
    failed: int = 0
    full: int = 0  # refused with 429
    expired: int = 0  # their deadline passed
    dropped: int = 0  # their caller left
    waiting_s: float = 0.0
    computing_s: float = 0.0
    sizes: Counter[int] = field(default_factory=Counter)

    @asynccontextmanager
    async def within(self, deadline: float) -> AsyncIterator[None]:
        """A caller's wait, until a time of `time.monotonic()`: what ends it early is counted. Raises Refused (504)."""
        try:
            async with asyncio.timeout(None if math.isinf(deadline) else deadline - time.monotonic()) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            self.expired += 1
            raise Refused(504, "there was no answer within the time allowed; ask again, or less at a time") from None
        except asyncio.CancelledError:
            self.dropped += 1
            raise
