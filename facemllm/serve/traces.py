"""OpenTelemetry traces of the server, if they are configured: a span a request, its phases below it.

`traces()` gives them where `OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) is set and the exporter is there
(`pip install facemllm[traces]`). Spans hold doors, statuses, phases, kinds and tasks; never a picture or a text.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from facemllm.serve.language import Answer

log = logging.getLogger("facemllm.serve")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_MOST_ANSWERS = 64  # events a span; OpenTelemetry keeps 128


class Traces:
    """Spans through a tracer of OpenTelemetry, which sends them in a thread of its own."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer

    @contextmanager
    def request(self, door: str, headers: Mapping[str, str] | None) -> Iterator[Any]:
        """The span of a request, current until its end; a child of the caller's where `traceparent` names one."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers) if headers else None
        with self._tracer.start_as_current_span(
            f"request {door}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes={"facemllm.door": door},
            record_exception=False,  # its text is not for others
            set_status_on_exception=False,
        ) as span:
            yield span

    def ended(self, span: Any, status: str) -> None:
        """How a request was answered; a failure of the server's own is an error."""
        from opentelemetry.trace import StatusCode

        span.set_attribute("facemllm.status", status)
        if status.startswith("5") or status in ("INTERNAL", "UNKNOWN", "UNAVAILABLE"):
            span.set_status(StatusCode.ERROR)

    def phase(self, name: str, seconds: float, ago: float) -> None:
        """A span below the current one that ended `ago` seconds before now and took `seconds`."""
        end = time.time_ns() - int(ago * 1e9)
        self._tracer.start_span(name, start_time=end - int(seconds * 1e9)).end(end)

    def answer(self, answer: Answer) -> None:
        """An event of the current span: the kind of an answer and the task it was about."""
        from opentelemetry import trace

        span = trace.get_current_span()
        if span.is_recording() and len(getattr(span, "events", ())) < _MOST_ANSWERS:
            span.add_event("answer", {"kind": answer.kind, "task": answer.task or "", "rule": answer.rule or ""})


def traces(about: Mapping[str, str]) -> Traces | None:
    """Traces to the collector that the environment names, as OpenTelemetry reads it; None where it names none, or the
    exporter is not installed, which is said once. `about` joins the resource: model, version, digest."""
    if not any(os.environ.get(name) for name in ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED", "") == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("no traces: %s is set, but not installed is facemllm[traces]", ENDPOINTS[1])
        return None
    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "facemllm-serve"}
    resource = Resource.create({**{f"facemllm.{name}": value for name, value in about.items()}, **named})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider.get_tracer("facemllm.serve"))
