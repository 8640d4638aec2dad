"""Who may ask a model's server next: so many requests at once, clients in turn, without a thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from facemllm.serve.engine.room import IDLE, Counters, Load, Room, UnderWay


class Turns:
    """Admits jobs within a `Room` (as a scheduler that computes a batch while another waits), and lets `at_once`
    requests of those admitted run: after each the next client's."""

    def __init__(self, room: Room, at_once: int) -> None:
        self._room, self._free = room, at_once
        self.counters = Counters()
        self._held: dict[str, int] = {}  # jobs by client
        self._cost = 0.0
        self._pace: float | None = None  # seconds between two ends of a unit of cost
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # the client whose turn it is comes first

    def check(self, client: str, deadline: float, cost: float = 1, under_way: UnderWay = IDLE) -> None:
        """Raise Refused (429) where `admitted` would now, or once the requests `under_way` have come."""
        held, running = self._held.get(client, 0), self.counters.running
        load = Load.of(held, running, 0, len(self._held), self._cost, self._pace, under_way)
        self._room.require(self.counters, load, cost, deadline, crowd=2 * self._room.batch)

    @asynccontextmanager
    async def admitted(self, client: str, deadline: float, cost: float) -> AsyncIterator[None]:
        """A job's time in the server. Raises Refused: 429 as `check`, 504 when the deadline passed."""
        self.check(client, deadline, cost)
        self._held[client] = self._held.get(client, 0) + 1
        self._cost += cost
        self.counters.taken += 1
        self.counters.running += 1
        came, ended = time.monotonic(), False
        try:
            async with self.counters.within(deadline):
                yield
            ended = True
        finally:
            self._measure(time.monotonic() - came, cost)
            self.counters.finished += ended
            self.counters.failed += not ended
            self.counters.running -= 1
            self._cost = max(0.0, self._cost - cost)
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]

    def _measure(self, seconds: float, cost: float) -> None:
        """Keep the pace: what a job took, shared by all that was in the server with it."""
        self.counters.computing_s += seconds
        pace = seconds / max(self._cost, cost)
        self._pace = pace if self._pace is None else 0.8 * self._pace + 0.2 * pace

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """One request's time at the model's server."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(client)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, client: str) -> None:
        own: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(client, deque())
        queue.append(own)
        self.counters.waiting += 1
        try:
            await own
        except asyncio.CancelledError:
            if own.done() and not own.cancelled():  # its turn had come
                self._pass_on()
            else:
                queue.remove(own)
                if not queue:
                    self._queues.pop(client, None)
            raise
        finally:
            self.counters.waiting -= 1

    def _pass_on(self) -> None:
        if not self._queues:
            self._free += 1
            return
        client, queue = next(iter(self._queues.items()))
        del self._queues[client]
        queue.popleft().set_result(None)
        if queue:
            self._queues[client] = queue  # behind all others
