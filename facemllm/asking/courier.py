"""The courier: a small process that carries requests to an endpoint, and outlives the worker that sent it.

    python -m facemllm.asking.courier      (started by `link.py`, fed through its standard input)

A worker of Ray can be killed at any moment, and a request that is on its way then is paid for. So the worker does not
send it: it hands it to a courier of its own, through a pipe. The courier sends, stores the reply, and only then
answers. When the pipe closes, its worker is gone: the courier starts nothing new, waits for the answers that are on
their way (no longer than `timeout_s` each), stores them and ends. It is in a session of its own and no child of the
worker, so what ends a job does not end it. Whoever asks the same meanwhile waits for its claim and finds the reply in
the store.

Only when the courier itself is killed, or the machine stops, is a request in doubt: its note stays, and the next job
counts it and sends it again under the same `Idempotency-Key`, which endpoints that know the header answer once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import struct
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from facemllm.asking.account import Account, most_tokens
from facemllm.asking.store import Claims, Replies, Reply, price
from facemllm.asking.wire import Again, Answered, Broken, Declined, Request, Spec, Wire

HEAD = struct.Struct(">II")
"""Before every message to the courier: bytes of its JSON, bytes of its picture."""

FAILED_ROWS = 5
"""So many rows one after the other that get no answer, however often asked: the endpoint fails, not the rows."""

DECLINED_ROWS = 50
"""So many that are declined as they are, after others were answered."""

_IDLE_S = 60.0
_AHEAD = 32  # requests that wait for a slot, or whose replies are being stored, while others are on their way
_POLL_S = 0.05
_LONGEST_PAUSE_S = 60.0


class Stop(Exception):
    """The courier does not go on; the message is why, and empty when its worker is gone."""


class Refuse(Exception):
    """The endpoint does not answer this request; the message is why. `filtered`: its content filter declines it."""

    def __init__(self, why: str, filtered: bool = False) -> None:
        super().__init__(why)
        self.filtered = filtered


class Courier:
    """Asks for replies: each once, within the budget, again after passing trouble, and stores them."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.wire = Wire(spec)
        self.replies = Replies(Path(spec.home))
        self.claims = Claims(Path(spec.home))
        self.account = Account(Path(spec.home), spec.account)
        self._slots = asyncio.Semaphore(spec.parallel)
        self._halt = asyncio.Event()
        self._why = ""
        self._asking: dict[str, asyncio.Task[Reply]] = {}
        self._sent = 0  # reservations of this courier that are not settled yet
        self._answers = self._failed_rows = 0
        self._answered_before = self.account.read().answered > 0
        self._pause_until = 0.0

    def halt(self, why: str = "") -> None:
        """Start nothing new. What is on its way is still waited for."""
        self._why = self._why or why
        self._halt.set()

    async def close(self) -> None:
        """Wait for what is on its way, and let go of everything."""
        self.halt()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        await self.wire.close()
        self.account.close()
        self.claims.close()

    async def ask(self, request: Request) -> Reply:
        """The reply: from the store, from another asker, or from the endpoint. Raises Refuse or Stop."""
        if request.key not in self._asking:
            task = asyncio.create_task(self._claimed(request))
            self._asking[request.key] = task
            task.add_done_callback(lambda _: self._asking.pop(request.key))
        return await asyncio.shield(self._asking[request.key])

    async def _claimed(self, request: Request) -> Reply:
        longest = (self.spec.retries + 1) * (4 * self.spec.timeout_s + _LONGEST_PAUSE_S)
        deadline = time.monotonic() + longest
        while not self.claims.take(request.key):
            self._go_on()
            if time.monotonic() > deadline:
                raise Stop(f"another process has been asking the same for {longest:.0f} s; end it and run again")
            await asyncio.sleep(_POLL_S)
        try:
            stored = self.replies.read(request.image_id, request.key)
            if stored is not None:
                return stored
            self._go_on()
            if self.replies.noted(request.image_id, request.key):
                self.account.add(in_doubt=1)
            try:
                return await self._sent_until_answered(request)
            finally:
                self.replies.unnote(request.image_id, request.key)
        finally:
            self.claims.give(request.key)

    async def _sent_until_answered(self, request: Request) -> Reply:
        failures, seen = 0, self._answers
        while True:
            async with self._slots:
                await self._until_pause_is_over()
                hold = await self._reserved(request)
                started = time.monotonic()
                try:
                    await asyncio.to_thread(self.replies.note, request.image_id, request.key)
                    outcome = await self.wire.attempt(request)
                except BaseException:
                    self._sent -= 1
                    raise
                self._settle(hold, outcome)
            if isinstance(outcome, Answered):
                self._answers, self._failed_rows = self._answers + 1, 0
                return await self._kept(request, outcome, time.monotonic() - started)
            if isinstance(outcome, Broken):
                raise self._stopped(f"the endpoint refuses every request ({outcome.reason}); mend its key or address")
            if isinstance(outcome, Declined):
                if outcome.filtered:  # a row's own fate, and no failure of the endpoint
                    raise Refuse(f"the endpoint's content filter declines this request ({outcome.reason})", True)
                some_are_answered = outcome.form and (self._answered_before or self._answers)
                self._count_failed_row(outcome.reason, DECLINED_ROWS if some_are_answered else FAILED_ROWS)
                raise Refuse(f"the endpoint declines this request ({outcome.reason})")
            # trouble that everyone has is this request's own only while nobody else is answered
            failures = 1 if outcome.everyone and self._answers > seen else failures + 1
            seen = self._answers
            if failures > self.spec.retries:
                if outcome.everyone:
                    raise self._stopped(f"the endpoint does not answer, asked {failures} times ({outcome.reason})")
                self._count_failed_row(outcome.reason, FAILED_ROWS)
                raise Refuse(f"the endpoint gave no answer, asked {failures} times ({outcome.reason})")
            await self._pause(outcome, failures)
            self.account.add(retries=1)

    async def _reserved(self, request: Request) -> int:
        """Tokens set aside for a request. Waits while requests that are under way may leave something over."""
        prompt = most_tokens("".join(m["text"] for m in request.messages), self.spec.image_side)
        limits = self.spec.max_requests, self.spec.token_budget
        while True:
            self._go_on()
            hold = self.account.reserve(prompt, self.spec.max_tokens, *limits)
            if isinstance(hold, int):
                break
            if not self._sent:
                raise self._stopped(f"annotate.endpoint.{hold} is used up; raise it")
            await asyncio.sleep(_POLL_S)
        self._sent += 1
        if request.repair:
            self.account.add(repairs=1)
        return hold

    def _settle(self, hold: int, outcome: Any) -> None:
        self._sent -= 1
        if isinstance(outcome, Answered):
            self.account.settle(hold, outcome.prompt_tokens, outcome.completion_tokens)
        elif isinstance(outcome, Again) and outcome.doubt:
            self.account.add(in_doubt=1)
        else:
            self.account.give_back(hold)

    async def _kept(self, request: Request, answered: Answered, seconds: float) -> Reply:
        prices = self.spec.input_price, self.spec.output_price
        reply = Reply(
            key=request.key,
            image_id=request.image_id,
            model=self.spec.model,
            prompt_hash=request.prompt_hash,
            text=answered.text,
            error=answered.error,
            prompt_tokens=answered.prompt_tokens,
            completion_tokens=answered.completion_tokens,
            finish=answered.finish,
            seconds=round(seconds, 3),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            cost=price(answered.prompt_tokens, answered.completion_tokens, *prices),
        )
        await asyncio.to_thread(self.replies.write, reply)
        return reply

    def _count_failed_row(self, reason: str, limit: int) -> None:
        self._failed_rows += 1
        if self._failed_rows >= limit:
            raise self._stopped(f"the endpoint answered none of {limit} rows one after the other ({reason})")

    async def _pause(self, outcome: Again, failures: int) -> None:
        own = min(self.spec.backoff_s * 2 ** (failures - 1), _LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
        until = time.monotonic() + (own if outcome.after_s is None else outcome.after_s)
        if outcome.everyone:
            self._pause_until = max(self._pause_until, until)
        await self._sleep(until - time.monotonic())

    async def _until_pause_is_over(self) -> None:
        while (left := self._pause_until - time.monotonic()) > 0:
            await self._sleep(left)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._halt.wait(), max(seconds, 0.0))
        self._go_on()

    def _go_on(self) -> None:
        if self._halt.is_set():
            raise Stop(self._why)

    def _stopped(self, why: str) -> Stop:
        self.halt(why)
        return Stop(self._why)


async def serve() -> None:
    """Read requests from standard input and answer on standard output, as JSON lines, until the worker is gone."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    head, _ = await _message(reader)
    courier = Courier(Spec(**head))
    loop.add_signal_handler(signal.SIGTERM, courier.halt)
    gone = sys.stdout.fileno()

    def alone() -> None:
        loop.remove_reader(gone)
        courier.halt()

    loop.add_reader(gone, alone)  # nobody reads the answers any more: that shows before the end of what is in the pipe
    under_way: set[asyncio.Task[None]] = set()
    try:
        while True:
            while len(under_way) >= courier.spec.parallel + _AHEAD:
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            try:
                async with asyncio.timeout(_IDLE_S):
                    head, picture = await _message(reader)
            except TimeoutError:
                if not under_way:
                    return
                continue
            number = head.pop("number")
            request = Request(**head, picture=picture) if head else None
            task = asyncio.create_task(_answer(courier, number, request))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
    except asyncio.IncompleteReadError:
        courier.halt()
    finally:
        await asyncio.gather(*under_way, return_exceptions=True)
        await courier.close()


async def _answer(courier: Courier, number: int, request: Request | None) -> None:
    answer: dict[str, Any] = {"refused": ""}
    try:
        if request is not None:
            answer = {"reply": asdict(await courier.ask(request))}
    except Refuse as refused:
        answer = {"refused": str(refused), "filtered": refused.filtered}
    except Stop as stop:
        answer = {"stop": str(stop) or "the courier was asked to end; run again"}
    except Exception as error:
        courier.halt(f"the courier failed ({type(error).__name__}: {error})")
        answer = {"stop": f"the courier failed ({type(error).__name__}: {error})"}
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(json.dumps({"number": number, **answer}).encode() + b"\n")
        sys.stdout.buffer.flush()


async def _message(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    words, picture = HEAD.unpack(await reader.readexactly(HEAD.size))
    return json.loads(await reader.readexactly(words)), await reader.readexactly(picture)


if __name__ == "__main__":
    # Ray ends the children of a worker that leaves; a child's child, in a session of its own, stays
    if os.fork():
        os._exit(0)
    os.setsid()
    asyncio.run(serve())
