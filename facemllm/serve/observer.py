"""What happens in the server, reported by plain calls of doors and service to an `Observer`.

It passes on to metrics, traces and the log, as far as there are any. `Watch` and `grpc_interceptor` tell it of every
request at the door it came through.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from facemllm.serve.language import Answers, Ask
from facemllm.serve.records import Records
from facemllm.serve.traces import Traces

if TYPE_CHECKING:
    from facemllm.serve.metrics import Metrics

Phase = Literal["decode", "queue", "model", "answer"]
"""Where the time of a request goes: decoding its pictures, waiting, the model's pass, making answers of it."""

CLOSED = "499"
"""The status of a request whose client went away before anything was answered, as nginx writes it."""

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


@dataclass
class ObservedRequest:
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
    def request(self, door: str, headers: Mapping[str, str] | None = None) -> Iterator[ObservedRequest]:
        """Around one request: counted with the status that is set on what is given, timed, a span where traces are
        kept. `headers` may name the caller's span (`traceparent`)."""
        observed, started = ObservedRequest(), time.perf_counter()
        with self.traces.request(door, headers) if self.traces else _nothing() as span:
            try:
                yield observed
            except Exception:
                observed.status = observed.status or "500"
                raise
            finally:
                observed.status = observed.status or CLOSED
                if self.traces:
                    self.traces.ended(span, observed.status)
                if self.metrics:
                    self.metrics.requests.labels(door, observed.status).inc()
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
        with self.observer.request(door_of(scope["path"]), {"traceparent": parent} if parent else None) as observed:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    observed.status = str(message["status"])
                await send(message)

            return await self.app(scope, receive, noted)


def grpc_interceptor(observer: Observer) -> Any:
    """An interceptor of a gRPC server, the outermost: every call is a request of the observer's, with gRPC's status."""
    import grpc
    from grpc_interceptor.server import AsyncServerInterceptor

    names = {code.value[0]: code.name for code in grpc.StatusCode}

    class Observed(AsyncServerInterceptor):
        async def intercept(self, method: Any, request_or_iterator: Any, context: Any, method_name: str) -> Any:
            metadata = {name: value for name, value in context.invocation_metadata() or () if name == "traceparent"}
            with observer.request(
                "grpc" if method_name.endswith("/ModelInfer") else "about", metadata or None
            ) as observed:
                try:
                    response = await method(request_or_iterator, context)
                except Exception:
                    observed.status = "UNKNOWN"
                    raise
                code = context.code()
                observed.status = "OK" if not code else getattr(code, "name", None) or names.get(code, "UNKNOWN")
                return response

    return Observed()
