"""Who is answered next: a bounded queue, fair between clients, that one thread empties in batches.

The unit of work is a job: one face and all its questions. Nothing waits for a batch to fill: the thread takes what has
gathered, so a lone request is answered at once and a crowd shares passes. Between clients the least served goes first,
and of equals the one that came first (fair queueing by cost, which between equal jobs is round robin). The event loop
stays free for health checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from facemllm.serve.engine.room import IDLE, Counters, Load, Room, UnderWay
from facemllm.serve.language import Refused

log = logging.getLogger("facemllm.serve")

Work = TypeVar("Work")
Result = TypeVar("Result")

_SMOOTHING = 0.2  # weight of the newest batch in the measured pace


class Job(Generic[Work, Result]):
    """A piece of work, who asked for it, and until when. `rows` is how many open questions it holds."""

    def __init__(self, work: Work, client: str, deadline: float, cost: float, rows: int) -> None:
        self.work, self.client, self.deadline, self.cost, self.rows = work, client, deadline, cost, rows
        self.came = time.monotonic()
        self.left = self.ended = self.failed = self.counted = self.running = False
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Result] = self._loop.create_future()

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it, and in time."""
        return not self.left and time.monotonic() < self.deadline

    def finish(self, result: Result) -> None:
        """Give the result to the caller. From any thread; what comes after the first end is ignored."""
        self._end(lambda: self.future.set_result(result))

    def fail(self, error: Exception) -> None:
        """Give the caller an exception."""
        self.failed = not self.ended
        self._end(lambda: self.future.set_exception(error))

    def _end(self, give: Callable[[], None]) -> None:
        if self.ended:
            return
        self.ended = True
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits
            self._loop.call_soon_threadsafe(lambda: None if self.future.done() else give())


class Runner(Protocol[Work, Result]):
    """What computes; in the scheduler's thread alone."""

    def step(self, new: Sequence[Job[Work, Result]]) -> None:
        """Begin new jobs and do a bit of those begun; each job is finished, or failed, in some step. One that is no
        longer `wanted` has to be given up: failed with anything."""

    def reset(self) -> None:
        """Forget all jobs: a step raised, and they were failed."""


class _Client(Generic[Work, Result]):
    """What one client has in the queue, and how much it was served, in cost: its virtual time."""

    def __init__(self, served: float) -> None:
        self.served = served
        self.jobs: deque[Job[Work, Result]] = deque()
        self.running = 0


class Scheduler(Generic[Work, Result]):
    """Gives jobs to a runner in a thread of its own."""

    def __init__(self, runner: Runner[Work, Result], room: Room | None = None) -> None:
        self._runner, self._room = runner, room or Room()
        self.counters = Counters()
        self._changed = threading.Condition()
        self._clients: dict[str, _Client[Work, Result]] = {}
        self._running: list[Job[Work, Result]] = []
        self._cost = 0.0  # of what waits and runs
        self._clock = 0.0  # virtual time: how much each client was served that always had something in the queue
        self._ahead: dict[str, float] = {}  # virtual times of clients that left, later than the clock
        self._pace: float | None = None  # seconds a unit of cost
        self._since = self._since_cost = 0.0  # seconds of computing, and cost of what ended, since the pace was taken
        self._closed = False
        self._thread: threading.Thread | None = None

    async def submit(
        self, work: Work, *, client: str = "", deadline: float = math.inf, cost: float = 1, rows: int = 0
    ) -> Result:
        """The result of a piece of work; `cost` is in questions. Raises Refused (429: too much waits, 503: the server
        stops, 504: the deadline passed), or what the runner failed it with. Nothing is begun for a cancelled caller."""
        job: Job[Work, Result] = Job(work, client, deadline, cost, rows)
        self._enter(job)
        try:
            async with self.counters.within(deadline):
                return await job.future
        finally:
            self._leave(job)

    def close(self, seconds: float | None = None) -> None:
        """Refuse new work, finish what is there, end the thread; wait so long for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    def check(
        self, *, client: str = "", deadline: float = math.inf, cost: float = 1, under_way: UnderWay = IDLE
    ) -> None:
        """Raise Refused as `submit` would now, before anything costly is done for a request. Of the requests
        `under_way`, those that are not here yet will come first."""
        with self._changed:
            self._check(client, deadline, cost, under_way)

    def _check(self, client: str, deadline: float, cost: float, under_way: UnderWay = IDLE) -> None:
        room, own = self._room, self._clients.get(client)
        if self._closed:
            raise Refused(503, "the server is stopping; ask another, or again in a moment", 1.0)
        held = 0 if own is None else len(own.jobs) + own.running
        clients, waiting = len(self._clients), self.counters.waiting
        load = Load.of(held, waiting, len(self._running), clients, self._cost, self._pace, under_way)
        room.require(self.counters, load, cost, deadline, crowd=room.batch)

    def _enter(self, job: Job[Work, Result]) -> None:
        with self._changed:
            self._check(job.client, job.deadline, job.cost)
            own = self._clients.get(job.client)
            if own is None:
                own = self._clients[job.client] = _Client(self._ahead.pop(job.client, self._clock))
            own.jobs.append(job)
            job.counted = True
            own.served = max(own.served, self._clock) if len(own.jobs) == 1 else own.served
            self.counters.waiting += 1
            self._cost += job.cost
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="model", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _leave(self, job: Job[Work, Result]) -> None:
        """The caller has gone, with or without a result: what waits for it still is forgotten."""
        job.left = True
        with self._changed:
            if job.counted and not job.running:
                self._clients[job.client].jobs.remove(job)
                self.counters.waiting -= 1
            if job.ended or not job.running:
                self._count_out(job)

    def _count_out(self, job: Job[Work, Result]) -> None:
        """A job holds no place any more."""
        if not job.counted:
            return
        job.counted = False
        self._cost = max(0.0, self._cost - job.cost)
        own = self._clients[job.client]
        own.running -= job.running
        if not own.jobs and not own.running:
            del self._clients[job.client]
            if own.served > self._clock:
                self._ahead[job.client] = own.served

    def _work(self) -> None:
        last = 0
        while True:
            with self._changed:
                while not self.counters.waiting and not self._running:
                    if self._closed:
                        return
                    self._changed.wait()
                self._gather(last)
                new = self._take()
                self._running += new
                self.counters.running = len(self._running)
            if new:
                last = len(new)
            if self._running:
                self._step(new)

    def _gather(self, last: int) -> None:
        """Wait a little where the last batch was shared: those answered with it are about to ask again."""
        room = self._room
        if last < 2 or self._running or not room.window_s:
            return
        end = time.monotonic() + room.window_s
        while self.counters.waiting < min(last, room.batch) and (rest := end - time.monotonic()) > 0:
            self._changed.wait(rest)

    def _take(self) -> list[Job[Work, Result]]:
        """The next batch. A job whose open questions do not fit keeps its place, and no other open one overtakes."""
        room = self._room
        rows = max(0, room.rows - sum(job.rows for job in self._running))
        blocked: set[str] = set()
        taken: list[Job[Work, Result]] = []
        now = time.monotonic()
        while len(taken) < room.batch:
            ready = [(name, own) for name, own in self._clients.items() if own.jobs and name not in blocked]
            if not ready:
                break
            name, own = min(ready, key=lambda one: (one[1].served, one[1].jobs[0].came))
            job = own.jobs[0]
            if job.rows > rows and job.wanted and (self._running or any(one.rows for one in taken)):
                blocked.add(name)
                rows = 0
                continue
            own.jobs.popleft()
            self.counters.waiting -= 1
            if not job.wanted:  # its caller has gone or is about to be told
                self._count_out(job)
                continue
            self._clock = max(self._clock + job.cost / len(self._clients), own.served)
            own.served += job.cost
            own.running += 1
            job.running = True
            rows = max(0, rows - job.rows)
            taken.append(job)
            self.counters.waiting_s += now - job.came
        self._ahead = {name: served for name, served in self._ahead.items() if served > self._clock}
        self.counters.taken += len(taken)
        if taken:
            self.counters.sizes[len(taken)] += 1
        return taken

    def _step(self, new: list[Job[Work, Result]]) -> None:
        started = time.monotonic()
        try:
            self._runner.step(new)
        except Exception as error:  # every caller must hear of it, whatever it is
            log.error("%s in the model's thread", type(error).__name__)
            for job in self._running:
                job.fail(error)
            self._runner.reset()
        seconds = time.monotonic() - started
        with self._changed:
            self.counters.computing_s += seconds
            ended = [job for job in self._running if job.ended]
            self._running = [job for job in self._running if not job.ended]
            for job in ended:
                self._count_out(job)
            self.counters.finished += sum(not job.failed for job in ended)
            self.counters.failed += sum(job.failed for job in ended)
            self.counters.running = len(self._running)
            self._measure(seconds, sum(job.cost for job in ended))

    def _measure(self, seconds: float, cost: float) -> None:
        """Keep the pace: seconds of computing a unit of cost, smoothed. Measured once as much has ended as half of what
        still runs: a small job that ends first is not charged with the time of a large one beside it."""
        self._since += seconds
        self._since_cost += cost
        if cost and 2 * self._since_cost >= sum(job.cost for job in self._running):
            pace = self._since / self._since_cost
            self._pace = pace if self._pace is None else (1 - _SMOOTHING) * self._pace + _SMOOTHING * pace
            self._since = self._since_cost = 0.0
