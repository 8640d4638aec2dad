"""Observability of the server: metrics with bounded labels, traces, a log without pictures, texts or answers."""

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from facemllm.serve.language import Answer, Answers, Ask, Encoded, Question
from facemllm.serve.metrics import Metrics, follow_approval
from facemllm.serve.observer import CLOSED, Observer, Watch, door_of
from facemllm.serve.records import Records
from facemllm.serve.traces import Traces, traces
from tests.answering import Answering, Loopback

SECRET = "Is this Ada Lovelace of 12 St James's Square?"
PICTURE = b"\x89PNG picture of Ada"
ASK = Ask(Encoded(PICTURE, 8, 8, "ab" * 32), (Question(text=SECRET), Question(task="age", item="age")))
FOUND = Answers(
    (
        Answer("refused", "", rule="identification", reason=f"no names: {SECRET}"),
        Answer("taught", "about 35 years old", 35.0, {"35": 1.0}, 0.9, "age", "age"),
        Answer("free", "a tall man called Ada", task="foreign"),
        Answer("abstained", "", rule="blurred", reason="too blurred", task="expression"),
    )
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def observer(registry: CollectorRegistry) -> Observer:
    about = {"name": "face-mllm", "version": "3", "digest": "cd" * 32}
    return Observer(Metrics(("age", "expression"), ("identification", "blurred"), about, registry))


def test_questions_are_counted_by_kind_task_and_rule_and_by_nothing_else(
    observer: Observer, registry: CollectorRegistry
) -> None:
    observer.answered([ASK], [FOUND], 0.01)
    value = registry.get_sample_value
    assert value("facemllm_questions_total", {"kind": "taught", "task": "age"}) == 1
    assert value("facemllm_questions_total", {"kind": "free", "task": "none"}) == 1
    assert value("facemllm_refusals_total", {"rule": "identification"}) == 1
    assert value("facemllm_abstentions_total", {"rule": "blurred"}) == 1
    assert value("facemllm_model_info", {"name": "face-mllm", "version": "3", "digest": "cd" * 32}) == 1
    odd = Answers(tuple(Answer("refused", "", task=f"t{n}", rule=f"r{n}") for n in range(50)))
    before = len(generate_latest(registry).splitlines())
    observer.answered([ASK], [odd], 0.01)
    assert len(generate_latest(registry).splitlines()) <= before + 6, "strangers do not make labels"
    assert b"Ada" not in generate_latest(registry)


def test_phases_are_measured_and_a_scheduler_is_followed(observer: Observer, registry: CollectorRegistry) -> None:
    observer.spent("queue", 0.2, ago=0.1)
    with observer.timed("decode"):
        pass
    value = registry.get_sample_value
    assert value("facemllm_phase_seconds_sum", {"phase": "queue"}) == 0.2
    assert value("facemllm_phase_seconds_count", {"phase": "decode"}) == 1
    queue = SimpleNamespace(waiting=7, running=2, taken=5, finished=4, failed=0, full=3, expired=1, dropped=0)
    queue.waiting_s, queue.computing_s, queue.sizes = 1.5, 2.5, {1: 2, 16: 1}
    assert observer.metrics is not None
    observer.metrics.follow(queue)
    queue.waiting = 8
    assert value("facemllm_queue_length") == 8, "as it stands when somebody looks"
    assert value("facemllm_jobs_total", {"end": "full"}) == 3
    assert (value("facemllm_queue_seconds_sum"), value("facemllm_queue_seconds_count")) == (1.5, 5)
    assert value("facemllm_batch_size_bucket", {"le": "8.0"}) == 2
    assert value("facemllm_batch_size_bucket", {"le": "16.0"}) == 3
    assert value("facemllm_batch_size_sum") == 18


@pytest.mark.parametrize(
    ("path", "door"),
    [
        ("/", "page"),
        ("/v1/models/face-mllm:predict", "v1"),
        ("/v1/models/face-mllm", "about"),
        ("/v2/models/face-mllm/infer", "v2"),
        ("/v2/models/face-mllm/ready", "about"),
        ("/v2/health/live", "health"),
        ("/v1/chat/completions", "openai"),
        ("/openai/v1/chat/completions", "openai"),
        ("/openai/v1/models", "about"),
        ("/feedback", "feedback"),
        ("/wp-admin/Ada", "other"),
    ],
)
def test_a_path_leads_to_a_door(path: str, door: str) -> None:
    assert door_of(path) == door


def through(observer: Observer, path: str, app: Callable[..., Any]) -> None:
    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "path": path, "headers": []}
    asyncio.run(Watch(app, observer)(scope, None, send))  # type: ignore[arg-type]


def test_requests_are_counted_with_the_status_that_the_client_got(
    observer: Observer, registry: CollectorRegistry
) -> None:
    async def busy(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 429, "headers": []})

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("why")

    async def left(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    through(observer, "/v1/models/m:predict", busy)
    with pytest.raises(KeyError):
        through(observer, "/v1/models/m:predict", broken)
    with pytest.raises(asyncio.CancelledError):
        through(observer, "/v1/models/m:predict", left)
    for status in ("429", "500", CLOSED):
        assert registry.get_sample_value("facemllm_requests_total", {"door": "v1", "status": status}) == 1
    assert registry.get_sample_value("facemllm_request_seconds_count", {"door": "v1"}) == 3


def test_an_observer_of_nothing_takes_every_call() -> None:
    observer = Observer()
    with observer.request("grpc") as observed, observer.timed("model"):
        observed.status = "OK"
    observer.answered([ASK], [FOUND], 1.0)
    observer.spent("answer", 1.0)


def test_the_log_holds_digests_and_counts_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    Observer(records=Records("cd" * 32)).answered([ASK], [FOUND], 0.0123)
    (line,) = caplog.messages
    assert line == (
        "answered 4 questions about abababababab in 12 ms: 1 abstained, 1 free, 1 refused, 1 taught "
        "(blurred identification)"
    )
    for text in (SECRET, "Ada", "years", "tall man", "Square"):
        assert text not in caplog.text
    assert not list(tmp_path.iterdir())


def test_answers_are_kept_where_a_rule_says_so_and_no_longer(tmp_path: Path) -> None:
    now = datetime(2026, 11, 29, 12, tzinfo=UTC)
    old, kept = tmp_path / "answers-2026-11-26.jsonl", tmp_path / "answers-2026-11-27.jsonl"
    for file in (old, kept):
        file.write_text("{}\n")
    (tmp_path / "answers-of-mine.jsonl").write_text("mine")
    times = [now]
    records = Records("cd" * 32, tmp_path, days=2, clock=lambda: times[0])
    assert not old.exists()
    assert kept.exists()
    records.answered([ASK], [FOUND], 0.01)
    today = tmp_path / "answers-2026-11-29.jsonl"
    lines = [json.loads(line) for line in today.read_text().splitlines()]
    assert [(line["kind"], line["task"], line["answer"]) for line in lines][1] == (
        "taught",
        "age",
        "about 35 years old",
    )
    assert {line["image"] for line in lines} == {"ab" * 32}
    assert SECRET not in today.read_text(), "questions are never kept"
    assert today.stat().st_mode & 0o077 == 0
    times[0] = now + timedelta(days=3)
    records.answered([ASK], [FOUND], 0.01)
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == ["answers-2026-12-02.jsonl", "answers-of-mine.jsonl"]


def test_a_disk_that_is_gone_fails_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = Records("cd" * 32, tmp_path / "answers", days=2)
    (tmp_path / "answers").rmdir()
    (tmp_path / "answers").write_text("a file")
    records.answered([ASK], [FOUND], 0.01)
    assert "answers are not kept" in caplog.text


def test_a_withdrawn_approval_shows(registry: CollectorRegistry) -> None:
    approval = SimpleNamespace(withdrawn="")
    follow_approval(lambda: approval.withdrawn, registry)
    assert registry.get_sample_value("facemllm_withdrawn") == 0
    approval.withdrawn = "revoked: by Ada Lovelace"
    assert registry.get_sample_value("facemllm_withdrawn") == 1


def test_a_request_is_a_span_with_its_phases_below_it() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="mlflow brings it")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, kept = sdk.TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    observer = Observer(traces=Traces(provider.get_tracer("test")))
    parent = f"00-{'1' * 32}-{'2' * 16}-01"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        observer.spent("queue", 0.25, ago=0.5)
        observer.spent("model", 0.5)
        observer.answered([ASK], [FOUND], 0.8)
        await send({"type": "http.response.start", "status": 500, "headers": []})

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "path": "/v1/models/m:predict", "headers": [(b"traceparent", parent.encode())]}
    asyncio.run(Watch(app, observer)(scope, None, send))  # type: ignore[arg-type]
    queue, model, whole = kept.get_finished_spans()
    assert [one.name for one in (queue, model, whole)] == ["queue", "model", "request v1"]
    assert whole.parent is not None
    assert f"{whole.parent.span_id:x}" == "2" * 16
    assert {one.parent.span_id for one in (queue, model)} == {whole.context.span_id}
    assert model.end_time - model.start_time == 500_000_000
    assert abs(queue.end_time - model.start_time) < 100_000_000
    assert whole.attributes == {"facemllm.door": "v1", "facemllm.status": "500"}
    assert not whole.status.is_ok
    assert [event.attributes["kind"] for event in whole.events] == ["refused", "taught", "free", "abstained"]
    spans = " ".join(one.to_json() for one in (queue, model, whole))
    assert "years" not in spans
    assert "tall man" not in spans


def test_no_traces_where_none_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert traces({}) is None


def test_traces_arrive_at_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install facemllm[traces]")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies: list[bytes] = []

    class Collector(Answering):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self._send(200, b"")

    with Loopback(Collector) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        made = traces({"version": "3"})
        assert made is not None
        with Observer(traces=made).request("grpc") as observed:
            observed.status = "OK"
        made._tracer.span_processor.force_flush()
    (sent,) = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans
    assert {one.key: one.value.string_value for one in sent.resource.attributes}["facemllm.version"] == "3"
    assert sent.scope_spans[0].spans[0].name == "request grpc"
