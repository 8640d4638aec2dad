"""Who asks an OpenAI-compatible endpoint (`annotate.endpoint`): so many requests at once, each once, within the budget,
again after passing trouble, with every reply stored before it is used.

A process that is killed leaves at most `parallel` requests under way. They may have been paid for: the next job counts
them as in doubt, says so, and asks them again; everything else that was asked is in the store. What stops a job (a
spent budget, a failing endpoint, Ctrl-C) starts nothing new and waits for what is under way, no longer than `timeout_s`
each; a second Ctrl-C does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from facemllm.asking.completions import Again, Answered, Broken, Completions, Declined, is_loopback, key_of
from facemllm.asking.requests import Filtered, JobStopped, MakeRequest, Reply, Request, RowRefused, TooLong
from facemllm.asking.store import Account, Replies, Reserved, most_tokens, price
from facemllm.errors import UserError, one_line
from facemllm.settings import Settings
from facemllm.settings.data import Endpoint, VisionLanguage
from facemllm.tasks.spoken import spoken

FAILED_ROWS = 5
"""So many rows one after the other that get no answer, however often asked: the endpoint fails, not the rows."""

DECLINED_ROWS = 50
"""So many that are declined as they are, after others were answered; or by a filter, before any was."""

CUT_OFF_ROWS = 24
"""So many replies one after the other that are paid for and say nothing: cut off before, or empty."""

_POLL_S = 0.05
_REACH_S = 5.0
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class EndpointSender:
    """Sends to an endpoint and counts under `account`. It travels by pickling, and no secret is in it. Replies are
    asked for in the form of `schema`; `run` names the job; `backoff_s` is the first pause after a failure."""

    home: Path
    account: str
    endpoint: Endpoint
    model: VisionLanguage
    schema: Mapping[str, Any] | None = field(default=None, repr=False)
    backoff_s: float = 1.0
    run: str = field(default_factory=lambda: secrets.token_hex(8))

    def send(self, requests: Sequence[MakeRequest]) -> list[Reply | Exception]:
        """A stored reply to each request, in order; RowRefused in the place of one that is not given. Raises JobStopped
        when the endpoint fails, the budget is spent, or this machine does not have the key."""
        if not key_of(self.endpoint) and not is_loopback(str(self.endpoint.base_url)):
            raise JobStopped(
                f"{self.endpoint.key_variable} is not set where Ray's workers run; start Ray with it in the "
                "environment (a local head: `facemllm services down`, then set it)"
            )
        for run in [run for run in _CLIENTS if run != self.run]:
            _CLIENTS.pop(run).replies.close()
        if self.run not in _CLIENTS:
            _CLIENTS[self.run] = _Client(self)
        answers = _CLIENTS[self.run].answers(requests)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(answers)
        with ThreadPoolExecutor(1) as thread:  # a notebook, whose own loop waits here
            return thread.submit(asyncio.run, answers).result()


def parameters(settings: Settings) -> dict[str, Any]:
    """What shapes a model's replies beside the words: a part of their keys."""
    model = settings.annotate.vision_language
    return {"max_tokens": model.max_tokens, "temperature": model.temperature, "image_side": model.image_side}


def sender(
    settings: Settings, account: str, schema: Mapping[str, Any] | None = None, backoff_s: float = 1.0
) -> EndpointSender:
    """A sender to the configured endpoint. Raises UserError when its address or key cannot be used."""
    endpoint = settings.annotate.endpoint
    assert endpoint.base_url is not None
    _check_address(endpoint.base_url, endpoint.third_party)
    if not key_of(endpoint) and not is_loopback(endpoint.base_url):
        raise UserError(
            f"the environment variable {endpoint.key_variable} holds no key for {endpoint.base_url}; set it, or name "
            "another one in annotate.endpoint.key_variable"
        )
    return EndpointSender(
        home=settings.home,
        account=account,
        endpoint=endpoint,
        model=settings.annotate.vision_language,
        schema=schema,
        backoff_s=backoff_s,
    )


def reach(base_url: str) -> None:
    """Raises JobStopped when nobody is at the address, within seconds. Any answer will do; no key is shown."""
    try:
        httpx.get(base_url, timeout=_REACH_S, trust_env=not is_loopback(base_url), follow_redirects=False)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        raise JobStopped(
            f"nobody answers at {base_url} ({one_line(error, 200)}); start the endpoint, or mend its address "
            "(--base-url, annotate.endpoint.base_url)"
        ) from None
    except httpx.HTTPError:
        pass  # somebody is there, whatever is said


def _check_address(base_url: str, third_party: bool) -> None:
    where = "annotate.endpoint.base_url"
    try:
        parts = urlsplit(base_url)
        host, user = parts.hostname, parts.username
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise UserError(f"{where} is no address of an API; give it as in https://host/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise UserError(f"{where} ends in /completions, which is added to it; give it as in https://host/v1")
    if user is not None or parts.password is not None:
        raise UserError(f"{where} holds a user or password; put the key into the environment variable of key_variable")
    if third_party and parts.scheme == "http" and not is_loopback(base_url):
        raise UserError(
            f"{where}: pictures would go to {host} unencrypted; use https, or set annotate.endpoint.third_party: "
            "false if the endpoint is in your own network"
        )


class _Halted(Exception):
    """Another request has stopped the job."""


class _Client:
    """The requests of one job in this process, from batch to batch."""

    def __init__(self, sender: EndpointSender) -> None:
        self.sender, self.endpoint = sender, sender.endpoint
        self.replies = Replies(sender.home)
        self.account = Account(self.replies, sender.account)
        self._known_form = self.account.form(str(self.endpoint.base_url))
        self.completions = Completions(self.endpoint, sender.model, sender.schema, self._known_form)
        self._answered_before = self.account.read().answered > 0
        self._under_way = self._answers = self._failed_rows = self._cut_off = 0
        self._pause_until = 0.0
        self._stop: Exception | None = None
        self._halt: asyncio.Event

    async def answers(self, requests: Sequence[MakeRequest]) -> list[Reply | Exception]:
        """What `EndpointSender.send` gives, by as many workers as may ask at once."""
        self._halt, self._stop = asyncio.Event(), None
        answers: dict[int, Reply | Exception] = {}
        todo = iter(enumerate(requests))

        async def work() -> None:
            try:
                for number, make in todo:
                    answers[number] = await self._answer(make)
            except _Halted:
                pass
            except Exception as error:
                self._stop = self._stop or error
                self._halt.set()

        async with self.completions.connected():
            workers = asyncio.gather(*(work() for _ in range(min(self.endpoint.parallel, len(requests)))))
            try:
                await asyncio.shield(workers)
            except asyncio.CancelledError:  # Ctrl-C: what is under way is paid for
                self._halt.set()
                await workers
                raise
        if isinstance(self._stop, JobStopped):
            raise self._stop
        if self._stop is not None:  # ours, and no fault of a row
            raise JobStopped(f"asking failed ({type(self._stop).__name__}: {self._stop})") from self._stop
        return [answers[number] for number in range(len(requests))]

    async def _answer(self, make: MakeRequest) -> Reply | Exception:
        """The reply, or why this row has none. Raises JobStopped when no row can have one now."""
        try:
            request = await asyncio.to_thread(make)
        except Exception as error:  # its picture
            return error
        failures, answers = 0, self._answers
        while True:
            reserved = await self._reserved(request)
            if isinstance(reserved, Reply):
                return reserved
            outcome = await self._outcome(request, reserved)
            if isinstance(outcome, Reply):
                self._count_cut_off(outcome)
            if isinstance(outcome, Reply | RowRefused):
                return outcome
            if isinstance(outcome, Declined):
                outcome = self._declined(outcome)
            if isinstance(outcome, Broken):
                raise self._stopped(f"the endpoint refuses every request ({outcome.reason}); {outcome.mend}")
            if isinstance(outcome, RowRefused):
                return outcome
            # trouble that everyone has is this request's own only while nobody else is answered
            failures = 1 if outcome.everyone and self._answers > answers else failures + 1
            answers = self._answers
            if failures > self.endpoint.retries:
                if outcome.everyone:
                    raise self._stopped(f"the endpoint does not answer, asked {failures} times ({outcome.reason})")
                self._count_failed_row(outcome.reason, FAILED_ROWS)
                return RowRefused(f"the endpoint gave no answer, asked {failures} times ({outcome.reason})")
            await self._pause(outcome, failures)
            self.account.count(retries=1)

    async def _reserved(self, request: Request) -> Reserved | Reply:
        """The right to send a request, or its reply when another process has stored it meanwhile. Waits while another
        has it under way, or while what is under way here may leave something of the budget over."""
        words = "".join(m["text"] for m in request.messages)
        most = most_tokens(words, self.sender.model.image_side, len(request.pictures))
        limits = self.endpoint.max_requests, self.endpoint.max_tokens
        while True:
            await self._sleep(self._pause_until - time.monotonic())
            found = self.account.reserve(request, (most, self.sender.model.max_tokens), *limits)
            if isinstance(found, Reserved | Reply):
                return found
            if found.limit and not self._under_way:
                raise JobStopped(f"annotate.endpoint.{found.limit} is used up; raise it")
            await self._sleep(_POLL_S)

    async def _outcome(self, request: Request, reserved: Reserved) -> Reply | RowRefused | Declined | Again | Broken:
        """Sends a request once; its reply is stored, and its reservation settled."""
        self._under_way += 1
        started = time.monotonic()
        try:
            outcome, posts = await self.completions.attempt(request)
        except BaseException:  # a second Ctrl-C
            self.account.unanswered(reserved, in_doubt=True)
            raise
        else:
            if posts > 1:  # in forms that it did not understand
                self.account.count(requests=posts - 1, refused=posts - 1)
            if not isinstance(outcome, Answered):
                failure = outcome if isinstance(outcome, Again) else Again("")
                self.account.unanswered(reserved, in_doubt=failure.doubt, sent=failure.sent)
                return outcome
            self._answers, self._failed_rows = self._answers + 1, 0
            if self.completions.form is not None and self._known_form is None:
                self._known_form = self.completions.form
                self.account.remember_form(str(self.endpoint.base_url), self._known_form)
            prices = self.endpoint.input_price, self.endpoint.output_price
            cost = price(outcome.prompt_tokens, outcome.completion_tokens, *prices)
            model, seconds = str(self.sender.model.model), time.monotonic() - started
            reply = Reply.now(request, model, seconds, cost=cost, **asdict(outcome))
            kept = self.account.answered(reserved, reply)
            return reply if kept else RowRefused("its picture was forgotten while it was asked about")
        finally:
            self._under_way -= 1

    def _declined(self, outcome: Declined) -> RowRefused | Broken:
        """Why this row is declined; or all, as long as nobody was answered."""
        some_are_answered = self._answered_before or self._answers > 0
        if outcome.forbidden and not some_are_answered:
            return Broken(outcome.reason)
        if outcome.filtered or outcome.forbidden:  # a row's own fate, and no failure of the endpoint
            if outcome.forbidden or not some_are_answered:
                self._count_failed_row(outcome.reason, FAILED_ROWS if outcome.forbidden else DECLINED_ROWS)
            return Filtered(f"the endpoint's content filter declines this request ({outcome.reason})")
        if outcome.long:
            if not some_are_answered:
                self._count_failed_row(outcome.reason, DECLINED_ROWS)
            return TooLong("more tokens than the model at the endpoint reads")
        self._count_failed_row(outcome.reason, DECLINED_ROWS if outcome.form and some_are_answered else FAILED_ROWS)
        return RowRefused(f"the endpoint declines this request ({outcome.reason})")

    def _count_failed_row(self, reason: str, limit: int) -> None:
        self._failed_rows += 1
        if self._failed_rows >= limit:
            raise self._stopped(f"the endpoint answered none of {limit} rows one after the other ({reason})")

    def _count_cut_off(self, reply: Reply) -> None:
        empty = not reply.error and reply.finish != "content_filter" and not spoken(reply.text or "")
        half = reply.cut_off and self.sender.schema is not None  # half an object is none, either
        self._cut_off = self._cut_off + 1 if empty or half else 0
        if self._cut_off >= CUT_OFF_ROWS and not reply.cut_off:
            raise self._stopped(
                f"{self._cut_off} replies one after the other were empty (finish_reason {reply.finish or 'none'}); "
                f"see whether {self.sender.model.model} answers questions about pictures there, or name another model"
            )
        if self._cut_off >= CUT_OFF_ROWS:
            raise JobStopped(
                f"{self._cut_off} replies one after the other were cut off before they said anything: "
                f"annotate.vision_language.max_tokens ({self.sender.model.max_tokens}) is too little for this model, "
                "which may reason first; raise it"
            )

    def _stopped(self, why: str) -> JobStopped:
        return JobStopped(f"{why} (asked at {self.completions.url})")

    async def _pause(self, outcome: Again, failures: int) -> None:
        own = min(self.sender.backoff_s * 2 ** (failures - 1), _LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
        until = time.monotonic() + (own if outcome.after_s is None else outcome.after_s)
        if outcome.everyone:
            self._pause_until = max(self._pause_until, until)
        await self._sleep(until - time.monotonic())

    async def _sleep(self, seconds: float) -> None:
        """Raises _Halted, at the latest when the time is over, once the job is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._halt.wait(), seconds)
        if self._halt.is_set():
            raise _Halted


_CLIENTS: dict[str, _Client] = {}
"""Of this process, by `EndpointSender.run`: one."""
