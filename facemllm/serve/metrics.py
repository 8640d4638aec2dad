"""Prometheus metrics of the server, in the registry that KServe gives at `/metrics`.

Labels are doors, statuses, kinds, rules and the tasks of the deployment, never a client or a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from facemllm.serve.engine.room import Counters

NONE = "none"
"""The label of what is no task of the deployment, or no rule that is known."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_ENDS = ("finished", "failed", "full", "expired", "dropped")


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
        self.tasks, self.rules = frozenset(tasks), frozenset(rules)
        self._registry = registry or REGISTRY
        held: Any = {"namespace": "facemllm", "registry": self._registry}
        self.requests = Counter("requests", "Requests by door and status", ("door", "status"), **held)
        self.seconds = Histogram(
            "request_seconds", "Seconds from a request to the end of its answer", ("door",), buckets=_SECONDS, **held
        )
        self.questions = Counter(
            "questions", "Questions by how they were answered, and the task they were about", ("kind", "task"), **held
        )
        self.refusals = Counter("refusals", "Questions refused by a rule of the policy", ("rule",), **held)
        self.abstentions = Counter("abstentions", "Questions not answered, by what did not allow it", ("rule",), **held)
        self.phases = Histogram(
            "phase_seconds", "Seconds a request spent by phase", ("phase",), buckets=_SECONDS, **held
        )
        if about:
            Info("model", "The model that is served", **held).info(dict(about))

    def follow(self, queue: Counters) -> None:
        """Give what a scheduler counts, too, as it stands whenever somebody looks."""
        self._registry.register(_Followed(queue))

    def task(self, name: str | None) -> str:
        """A task as a label: bounded by the deployment."""
        return name if name in self.tasks else NONE

    def rule(self, name: str | None) -> str:
        """A rule as a label: bounded by those that are known."""
        return name if name in self.rules else NONE


def follow_approval(withdrawn: Callable[[], str], registry: CollectorRegistry = REGISTRY) -> None:
    """Give `facemllm_withdrawn`: 1 while `withdrawn` says why the approval of the model holds no more, else 0."""
    about = "Whether the approval of the model that serves was withdrawn"
    Gauge("withdrawn", about, namespace="facemllm", registry=registry).set_function(lambda: float(bool(withdrawn())))


class _Followed(Collector):
    def __init__(self, queue: Counters) -> None:
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        """The metrics, read when somebody asks."""
        queue = self._queue
        yield GaugeMetricFamily("facemllm_queue_length", "Jobs that wait for the model", queue.waiting)
        yield GaugeMetricFamily("facemllm_running", "Jobs that the model is at", queue.running)
        ended = CounterMetricFamily("facemllm_jobs", "Jobs by how they ended", labels=("end",))
        for end in _ENDS:
            ended.add_metric((end,), getattr(queue, end, 0))
        yield ended
        yield SummaryMetricFamily("facemllm_queue_seconds", "Seconds jobs waited", queue.taken, queue.waiting_s)
        yield CounterMetricFamily("facemllm_computing_seconds", "Seconds the model computed", queue.computing_s)
        sizes = dict(queue.sizes)
        upto = [(str(float(size)), float(sum(n for one, n in sizes.items() if one <= size))) for size in _SIZES]
        upto.append(("+Inf", float(sum(sizes.values()))))
        total = float(sum(size * n for size, n in sizes.items()))
        yield HistogramMetricFamily("facemllm_batch_size", "New jobs in a pass of the model", upto, total)
