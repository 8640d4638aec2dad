"""The server's queue: batches, fairness between clients, deadlines, callers that leave, and what does not fit."""

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from facemllm.serve.engine.batches import Job, Scheduler
from facemllm.serve.engine.room import Load, Room, UnderWay
from facemllm.serve.language import Refused

Asked = Job[Any, Any]


class Doubling:
    """Doubles numbers, in batches it keeps, each once `gate` is open; jobs with rows take as many steps as rows."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.batches: list[list[Any]] = []
        self.begun: list[tuple[Asked, int]] = []
        self.resets = 0

    def step(self, new: Sequence[Asked]) -> None:
        self.entered.set()
        assert self.gate.wait(20)
        if new:
            self.batches.append([job.work for job in new])
        going = []
        for job, left in [*self.begun, *((job, job.rows) for job in new)]:
            if not job.wanted:
                job.fail(RuntimeError("given up"))
            elif job.work == "broken":
                raise RuntimeError("broken")
            elif job.work == "odd":
                job.fail(Refused(400, "odd one"))
            elif left > 1:
                going.append((job, left - 1))
            else:
                job.finish(job.work * 2)
        self.begun = going

    def reset(self) -> None:
        self.resets += 1
        self.begun = []


def run(room: Room, go: Callable[[Scheduler[Any, Any], Doubling], Awaitable[Any]]) -> tuple[Any, Doubling, Any]:
    runner = Doubling()
    scheduler = Scheduler(runner, room)

    async def all_of_it() -> Any:
        async with asyncio.timeout(30):
            return await go(scheduler, runner)

    found = asyncio.run(all_of_it())
    runner.gate.set()
    scheduler.close(20)
    assert not scheduler._thread or not scheduler._thread.is_alive()
    assert (scheduler.counters.waiting, scheduler.counters.running, scheduler._cost) == (0, 0, 0)
    assert scheduler._clients == {}
    return found, runner, scheduler.counters


async def ask(scheduler: Scheduler[Any, Any], *works: Any, **options: Any) -> list[asyncio.Task[Any]]:
    """Submit, and return once all of them wait."""
    tasks = [asyncio.create_task(scheduler.submit(work, **options)) for work in works]
    await asyncio.sleep(0)
    return tasks


async def busy(scheduler: Scheduler[Any, Any], runner: Doubling, client: str = "first") -> asyncio.Task[Any]:
    """A job that is being computed, and ends when the gate opens."""
    (task,) = await ask(scheduler, 0, client=client)
    await asyncio.to_thread(runner.entered.wait, 20)
    return task


def results(tasks: Sequence[asyncio.Task[Any]]) -> Awaitable[list[Any]]:
    return asyncio.gather(*tasks, return_exceptions=True)


def test_what_waits_is_answered_together_and_failures_stay_their_own() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)
        others = await ask(scheduler, 1, 2, "odd", 4, 5)
        runner.gate.set()
        return await results([first, *others])

    found, runner, counters = run(Room(batch=4), go)
    assert runner.batches == [[0], [1, 2, "odd", 4], [5]]
    assert found[:3] + found[4:] == [0, 2, 4, 8, 10]
    assert isinstance(found[3], Refused)
    assert (counters.taken, counters.finished, counters.failed) == (6, 5, 1)
    assert counters.sizes == {1: 2, 4: 1}
    assert counters.waiting_s > 0
    assert counters.computing_s > 0


def test_a_broken_batch_is_heard_by_all_and_the_next_one_runs() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)
        others = await ask(scheduler, 1, "broken", 3)
        runner.gate.set()
        return await results([first, *others]), await scheduler.submit(7)

    (found, after), runner, counters = run(Room(), go)
    assert [str(one) for one in found] == ["0", "2", "broken", "broken"]
    assert (after, runner.resets, counters.failed) == (14, 1, 2)


def test_a_client_with_much_does_not_keep_others_waiting() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)
        much = await ask(scheduler, *(f"a{n}" for n in range(6)), client="a")
        little = await ask(scheduler, "b0", "b1", client="b") + await ask(scheduler, "c0", client="c")
        runner.gate.set()
        await results([first, *much, *little])

    _, runner, _ = run(Room(batch=1), go)
    assert [one for (one,) in runner.batches[1:]] == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_fairness_counts_questions_not_requests() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)
        heavy = await ask(scheduler, "a0", "a1", client="a", cost=3)
        light = await ask(scheduler, *(f"b{n}" for n in range(6)), client="b", cost=1)
        runner.gate.set()
        await results([first, *heavy, *light])

    _, runner, _ = run(Room(batch=1), go)
    assert [one for (one,) in runner.batches[1:]] == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "b5"]


def test_many_clients_that_ask_one_at_a_time_take_turns_and_none_waits_longer_than_two_rounds() -> None:
    clients, rounds = [f"a{number:02}" for number in range(64)], 6

    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)

        async def again(name: str) -> None:
            for _ in range(rounds):
                await scheduler.submit(name, client=name, cost=4)

        tasks = [asyncio.create_task(again(name)) for name in reversed(clients)]
        await asyncio.sleep(0)
        runner.gate.set()
        await results([first, *tasks])

    _, runner, _ = run(Room(wait_s=1000, window_s=0), go)
    order = [name for batch in runner.batches[1:] for name in batch]
    for name in clients:
        places = [-1, *(place for place, one in enumerate(order) if one == name)]
        assert len(places) == rounds + 1
        assert max(later - before for before, later in pairwise(places)) <= 2 * len(clients)


def test_who_comes_back_is_still_charged_and_is_forgotten_in_time() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)

        async def twice() -> None:
            await scheduler.submit("a0", client="a", cost=100)
            await scheduler.submit("a1", client="a", cost=1)

        tasks = [asyncio.create_task(twice())]
        tasks += await ask(scheduler, *(f"b{number}" for number in range(60)), client="b")
        runner.gate.set()
        await results([first, *tasks])
        for number in range(300):
            await scheduler.submit(number, client=str(number))
        return len(scheduler._ahead)

    left, runner, _ = run(Room(batch=1, window_s=0), go)
    order = [one for (one,) in runner.batches[1:63]]
    assert order[0] == "a0"
    assert order[-1] == "a1"
    assert left <= 2


def test_nothing_is_begun_for_a_caller_that_left_or_whose_time_is_over() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)
        (gone,) = await ask(scheduler, "gone")
        (late,) = await ask(scheduler, "late", deadline=time.monotonic() + 0.02)
        (kept,) = await ask(scheduler, "kept", deadline=time.monotonic() + 1000)
        gone.cancel()
        found = await results([gone, late])  # neither waits for the thread
        assert scheduler.counters.waiting == 1
        runner.gate.set()
        return found, await results([first, kept])

    ((gone, late), others), runner, counters = run(Room(), go)
    assert isinstance(gone, asyncio.CancelledError)
    assert late.status == 504
    assert others == [0, "keptkept"]
    assert runner.batches == [[0], ["kept"]]
    assert (counters.dropped, counters.expired) == (1, 1)


def test_what_is_begun_is_given_up_when_its_caller_leaves() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        runner.gate.set()
        (long,) = await ask(scheduler, "long", rows=10**9)
        await asyncio.to_thread(runner.entered.wait, 20)
        long.cancel()
        return await results([long]), await scheduler.submit(1)

    (_, after), runner, _ = run(Room(rows=10**9), go)
    assert after == 2
    assert runner.begun == []


def test_what_does_not_fit_is_refused_with_when_to_come_again() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)
        waiting = await ask(scheduler, 1, 2, client="a")
        refused = await results(await ask(scheduler, 3, client="a") + await ask(scheduler, 4, client="b", cost=100))
        waiting += await ask(scheduler, 5, client="b")
        refused += await results(await ask(scheduler, 6, client="c"))
        runner.gate.set()
        return refused, await results([first, *waiting])

    (refused, answered), _, counters = run(Room(faces=3, questions=50, client_faces=2), go)
    assert [one.status for one in refused] == [429] * 3
    assert ["your requests" in one.reason for one in refused] == [True, False, False]
    assert all(one.retry_after >= 1 for one in refused)
    assert answered == [0, 2, 4, 10]
    assert counters.full == 3


class Lingering(Doubling):
    """Ends its jobs, and computes on until the gate opens."""

    def step(self, new: Sequence[Asked]) -> None:
        for job in new:
            job.finish(job.work * 2)
        assert self.gate.wait(20)


def test_who_has_an_answer_may_ask_again_while_others_are_computed() -> None:
    runner = Lingering()
    scheduler: Scheduler[Any, Any] = Scheduler(runner, Room(client_faces=1))

    async def go() -> list[Any]:
        found = [await scheduler.submit(1)]
        (again,) = await ask(scheduler, 2)
        runner.gate.set()
        return [*found, await again]

    assert asyncio.run(go()) == [2, 4]
    scheduler.close(20)
    assert (scheduler._cost, scheduler._clients) == (0, {})


def test_a_request_as_large_as_the_queue_is_taken_when_nothing_waits() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        runner.gate.set()
        return await scheduler.submit(1, cost=1000)

    assert run(Room(questions=50), go)[0] == 2


def test_who_cannot_be_answered_in_time_is_told_at_once() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner, "")
        scheduler._pace = 10.0  # seconds a question, as measured
        waiting = await ask(scheduler, *range(9))
        (soon,) = await results(await ask(scheduler, "soon", deadline=time.monotonic() + 50))
        waiting += await ask(scheduler, "later", deadline=time.monotonic() + 500)
        runner.gate.set()
        return soon, await results([first, *waiting])

    (soon, answered), _, _ = run(Room(wait_s=1000), go)
    assert (soon.status, soon.retry_after) == (429, 100)
    assert answered[-1] == "laterlater"


def test_the_queue_is_no_longer_than_may_be_waited_and_a_refusal_can_be_had_before_the_work() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner, "")
        scheduler._pace = 1.0
        waiting = await ask(scheduler, 1, 2, 3)  # a batch may wait, however long
        scheduler.check(under_way=UnderWay(4, 4, 1))  # those that are here
        with pytest.raises(Refused, match="too busy"):
            scheduler.check(under_way=UnderWay(5, 5, 1))  # one will be before it
        waiting += await ask(scheduler, 4)
        with pytest.raises(Refused, match="too busy") as refused:
            scheduler.check()
        assert isinstance((await results(await ask(scheduler, 5)))[0], Refused)
        runner.gate.set()
        return refused.value.retry_after, await results([first, *waiting])

    assert run(Room(batch=4, wait_s=2.5), go)[0] == (5.0, [0, 2, 4, 6, 8])


@pytest.mark.parametrize(
    ("own", "here", "clients", "under_way", "rounds"),
    [
        (0, 0, 0, UnderWay(), 0),
        (3, 3, 1, UnderWay(), 3),
        (0, 4, 2, UnderWay(), 2),  # the others' first ones
        (2, 4, 2, UnderWay(), 5),  # as many of the other as of its own
        (0, 0, 0, UnderWay(6, 2, 3), 8),  # none has reached the queue
        (1, 8, 8, UnderWay(40, 5, 8), 47),
    ],
)
def test_a_job_waits_for_its_clients_turn(own: int, here: int, clients: int, under_way: UnderWay, rounds: int) -> None:
    """Whoever sends the most waits the longest, not as long as all on average."""
    load = Load.of(own, here, 0, clients, 1.0 * here, 0.25, under_way)
    assert (load.waits, load.jobs) == (0.25 * rounds, max(here, under_way.all))


def test_open_questions_wait_for_rows_and_closed_ones_do_not() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)
        tasks = await ask(scheduler, "a", client="a", rows=3)
        tasks += await ask(scheduler, "b", client="b", rows=3)
        tasks += await ask(scheduler, "c", client="c", rows=1)
        tasks += await ask(scheduler, "d", client="d")
        runner.gate.set()
        return await results([first, *tasks])

    found, runner, _ = run(Room(rows=4), go)
    assert found == [0, "aa", "bb", "cc", "dd"]
    assert runner.batches[1] == ["a", "d"]
    assert runner.batches[2] == ["b", "c"]  # not c before b, though there was room


def test_more_open_questions_than_rows_are_written_all_the_same_and_closed_ones_pass() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)
        tasks = await ask(scheduler, "all", client="a", rows=5)
        for client in "bcd":
            tasks += await ask(scheduler, client, client=client)
        tasks += await ask(scheduler, "later", client="e", rows=1)
        runner.gate.set()
        return await results([first, *tasks])

    found, runner, _ = run(Room(rows=4, batch=2), go)
    assert found == [0, "allall", "bb", "cc", "dd", "laterlater"]
    assert runner.batches[1:] == [["all", "b"], ["c", "d"], ["later"]]


def test_a_stopping_server_finishes_what_it_has_and_takes_no_more() -> None:
    async def go(scheduler: Scheduler[Any, Any], runner: Doubling) -> Any:
        first = await busy(scheduler, runner)
        waiting = await ask(scheduler, 1, 2)
        scheduler.close(0)
        with pytest.raises(Refused, match="stopping") as refused:
            await scheduler.submit(3)
        runner.gate.set()
        return refused.value.status, await results([first, *waiting])

    assert run(Room(), go)[0] == (503, [0, 2, 4])


def test_a_caller_whose_loop_has_ended_harms_nobody() -> None:
    runner = Doubling()
    scheduler: Scheduler[Any, Any] = Scheduler(runner)

    async def leave() -> None:
        job: Asked = Job("lost", "", math.inf, 1, 0)
        scheduler._enter(job)

    asyncio.run(leave())
    runner.gate.set()
    assert asyncio.run(scheduler.submit(4)) == 8
    scheduler.close(20)
