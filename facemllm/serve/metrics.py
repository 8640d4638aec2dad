"""What the server tells of its work: an `Observer` that doors, service and scheduler call, and Prometheus behind it.

`Watch` counts every HTTP request at the door it came through. `Metrics` stands in the registry that KServe gives at
`/metrics`. Labels are doors, statuses, kinds, rules and the tasks of the deployment, never a client or a text.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from facemllm.serve.language import Answers, Ask
from facemllm.serve.records import Records
from facemllm.serve.traces import Traces

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

Phase = Literal["decode", "queue", "model", "answer"]
"""Where the time of a request goes: decoding its pictures, waiting, the model's pass, making answers of it."""

NONE = "none"
"""The label of what is no task of the deployment, or no rule that is known."""

CLOSED = "499"
"""The status of a request whose client went away before anything was answered, as nginx writes it."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_EXACT = {
    **dict.fromkeys(("/", "/page.css", "/page.js", "/page/feedback"), "page"),
    **dict.fromkeys(("/info", "/policy", "/metrics", "/openapi.json", "/v1/models", "/openai/v1/models"), "about"),
    "/feedback": "feedback",
}
_WITHIN = {"/tasks": "tasks", "/openai/": "openai", "/v1/chat/": "openai", "/v2/health/": "health"}


def door_of(path: str) -> str:
    """The door that a path leads to: one of a dozen names, whatever the path is."""
    if path in _EXACT:
        return _EXACT[path]
    if door := next((door for start, door in _WITHIN.items() if path.startswith(start)), None):
        return door
    for version, verbs in (("v1", (":predict", ":explain")), ("v2", ("/infer", "/generate", "/generate_stream"))):
        if path.startswith(f"/{version}/"):
            return version if path.endswith(verbs) else "about"
    return "other"


class Metrics:
    """Counters and histograms in a registry, KServe's own by default.

    `tasks` and `rules` are the only values that these labels may have; `about` is what the model is (name, version,
    digest). Raises ValueError where the registry has these metrics already: one a process.
    """

    def __init__(
        self,
        tasks: Iterable[str],
        rules: Iterable[str] = (),
        about: Mapping[str, str] | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Info

        self.tasks, self.rules = frozenset(tasks), frozenset(rules)
        held: Any = {"namespace": "facemllm", "registry": registry or REGISTRY}
        self.requests = Counter("requests", "Requests by door and status", ("door", "status"), **held)
        self.seconds = Histogram(
            "request_seconds", "Seconds from a request to the end of its answer", ("door",), buckets=_SECONDS, **held
        )
        self.questions = Counter(
            "questions", "Questions by how they were answered, and the task they were about", ("kind", "task"), **held
        )
        self.refusals = Counter("refusals", "Questions refused by a rule of the policy", ("rule",), **held)
        self.abstentions = Counter("abstentions", "Questions not answered, by what did not allow it", ("rule",), **held)
        self.waiting = Gauge("queue_length", "Pieces of work that wait for the model", **held)
        self.batches = Histogram("batch_size", "Pieces of work in a pass of the model", buckets=_SIZES, **held)
        self.phases = Histogram(
            "phase_seconds", "Seconds a request spent by phase", ("phase",), buckets=_SECONDS, **held
        )
        if about:
            Info("model", "The model that is served", **held).info(dict(about))

    def task(self, name: str | None) -> str:
        """A task as a label: bounded by the deployment."""
        return name if name in self.tasks else NONE

    def rule(self, name: str | None) -> str:
        """A rule as a label: bounded by those that are known."""
        return name if name in self.rules else NONE


@dataclass
class Seen:
    """A request under way; whoever answers it sets `status`, an HTTP status or the name of a gRPC one."""

    status: str = ""


class Observer:
    """Takes what happens in the server, by plain calls that cost microseconds and never fail. Made of nothing, it
    keeps nothing, so that no part of the server asks whether it is watched."""

    def __init__(
        self, metrics: Metrics | None = None, traces: Traces | None = None, records: Records | None = None
    ) -> None:
        self.metrics, self.traces, self.records = metrics, traces, records

    @contextmanager
    def request(self, door: str, headers: Mapping[str, str] | None = None) -> Iterator[Seen]:
        """Around one request: counted with the status that is set on what is given, timed, a span where traces are
        kept. `headers` may name the caller's span (`traceparent`)."""
        seen, started = Seen(), time.perf_counter()
        with self.traces.request(door, headers) if self.traces else _nothing() as span:
            try:
                yield seen
            except Exception:
                seen.status = seen.status or "500"
                raise
            finally:
                seen.status = seen.status or CLOSED
                if self.traces:
                    self.traces.ended(span, seen.status)
                if self.metrics:
                    self.metrics.requests.labels(door, seen.status).inc()
                    self.metrics.seconds.labels(door).observe(time.perf_counter() - started)

    def answered(self, asks: Sequence[Ask], answers: Sequence[Answers], seconds: float) -> None:
        """Answers were found to the questions of a request, in its own task: counted by kind, noted in the log."""
        if self.records:
            self.records.answered(asks, answers, seconds)
        for answer in (one for found in answers for one in found.answers):
            if self.metrics:
                self.metrics.questions.labels(answer.kind, self.metrics.task(answer.task)).inc()
                if answer.kind == "refused":
                    self.metrics.refusals.labels(self.metrics.rule(answer.rule)).inc()
                elif answer.kind == "abstained":
                    self.metrics.abstentions.labels(self.metrics.rule(answer.rule)).inc()
            if self.traces:
                self.traces.answer(answer)

    def spent(self, phase: Phase, seconds: float, ago: float = 0.0) -> None:
        """A request spent so long in a phase, which ended just now, or `ago` seconds before. Called in the request's
        own task, where its span is known."""
        if self.metrics:
            self.metrics.phases.labels(phase).observe(seconds)
        if self.traces:
            self.traces.phase(phase, seconds, ago)

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """`spent` around what is done here."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent(phase, time.perf_counter() - started)

    def queued(self, waiting: int) -> None:
        """So many pieces of work wait now; called whenever that changes."""
        if self.metrics:
            self.metrics.waiting.set(waiting)

    def batch(self, size: int) -> None:
        """The model begins a pass over so many pieces of work."""
        if self.metrics:
            self.metrics.batches.observe(size)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class Watch:
    """ASGI middleware, the outermost: every HTTP request is one of the observer's, streams until their last byte."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self.app, self.observer = app, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and note how it was answered."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        parent = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), None)
        with self.observer.request(door_of(scope["path"]), {"traceparent": parent} if parent else None) as seen:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    seen.status = str(message["status"])
                await send(message)

            return await self.app(scope, receive, noted)
