"""Production's requests between two revisions of Knative, and what both did with them.

Times are those of the release's own questions, put to both by turns over the same way. Requests and errors are the
servers' own counts, of everybody's requests: from Prometheus, over all replicas, or from the one replica itself. Where
neither is there, or counts less than the release itself has met (a gateway that found no server), its own counts hold.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from facemllm.core import servers
from facemllm.errors import UserError, one_line
from facemllm.serve.canary import Side
from facemllm.serve.local.meters import Meter
from facemllm.settings import Settings

_ANSWER_S = 120.0
_DOORS = ("v1", "v2", "grpc", "openai", "tasks", "page")
_BUSY = ("429", "499", "RESOURCE_EXHAUSTED", "CANCELLED")
_FAILED = ("INTERNAL", "UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED")


@dataclass(frozen=True)
class Revision:
    """A revision of Knative, and where it alone answers."""

    name: str
    url: str


class RevisionSplit:
    """`share(percent)` of `apply` gives the canary its part; at 100 the former revision has no address any more, and
    stands as it did before."""

    def __init__(
        self, settings: Settings, stable: Revision, canary: Revision, apply: Callable[[float], object]
    ) -> None:
        self._known, self._apply, self._both = settings.cluster.serving, apply, (stable, canary)
        self._path = f"/v1/models/{settings.promote.model_name}:predict"
        self._client = httpx.Client(headers=servers.authorization(), timeout=_ANSWER_S, trust_env=False)
        self._own = (Meter(), Meter())
        self._first: list[Counter[str] | None] = [None, None]
        self._newest: list[Counter[str] | None] = [None, None]
        self._asked, self._percent, self._stood = 0.0, 0.0, Side()

    def share(self, percent: float) -> None:
        """Apply the share, and count anew."""
        if self._percent or self._own[0].requests:
            self._stood = self.sides(latency=False)[0]
        self._apply(percent)
        self._percent, self._own = percent, (Meter(), Meter())
        self._first = [self._counted(one) for one in self._both]
        self._newest, self._asked = list(self._first), time.monotonic()

    def sides(self, *, latency: bool) -> tuple[Side, Side]:
        """What both did since then. Raises UserError where Prometheus does not answer."""
        if time.monotonic() - self._asked > self._known.poll_s:
            self._newest, self._asked = [self._counted(one) for one in self._both], time.monotonic()
        stable, canary = (
            _side(own, before, now, latency)
            for own, before, now in zip(self._own, self._first, self._newest, strict=True)
        )
        return (stable if self._percent < 100 else self._stood), canary

    def ask(self, canary: bool, body: Any) -> httpx.Response | None:
        """Post a question to one revision, and note what became of it."""
        if not canary and self._percent >= 100:
            return None
        own, started = self._own[canary], time.perf_counter()
        try:
            reply = self._client.post(f"{self._both[canary].url}{self._path}", json=body)
        except httpx.HTTPError:
            own.failed(refused=False)
            raise
        own.answered(reply.status_code, time.perf_counter() - started)
        return reply

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def _counted(self, one: Revision) -> Counter[str] | None:
        """Requests of a revision by status, since it started; None where nobody counts them."""
        if self._known.prometheus:
            return self._of_prometheus(self._known.prometheus, one)
        if self._known.max_replicas > 1 or (one is self._both[0] and self._percent >= 100):
            return None
        try:
            return of_text(self._client.get(f"{one.url}/metrics").raise_for_status().text)
        except (httpx.HTTPError, ValueError):
            return None

    def _of_prometheus(self, address: str, one: Revision) -> Counter[str]:
        doors = "|".join(_DOORS)
        chosen = f'namespace="{self._known.production_namespace}",pod=~"{one.name}-.+",door=~"{doors}"'
        query = f"sum by (status) (facemllm_requests_total{{{chosen}}})"
        try:
            url = f"{address.rstrip('/')}/api/v1/query"
            reply = httpx.get(url, params={"query": query}, timeout=30, trust_env=False).raise_for_status().json()
            rows = reply["data"]["result"]
            return Counter({str(row["metric"]["status"]): int(float(row["value"][1])) for row in rows})
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"cluster.serving.prometheus: {address} does not answer: {one_line(error)}") from None


def of_text(text: str) -> Counter[str]:
    """Requests by status in what `/metrics` of a server says. Raises ValueError for what is no such text."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "facemllm_requests_total" and sample.labels["door"] in _DOORS:
                found[sample.labels["status"]] += int(sample.value)
    return found


def _side(own: Meter, before: Mapping[str, int] | None, now: Mapping[str, int] | None, latency: bool) -> Side:
    requests, errors = own.requests, own.errors
    if before is not None and now is not None:
        since = {status: max(0, count - before.get(status, 0)) for status, count in now.items() if status not in _BUSY}
        failed = sum(n for status, n in since.items() if status in _FAILED or (status.isdigit() and int(status) >= 500))
        requests, errors = max(requests, sum(since.values())), max(errors, failed)
    return Side(requests, errors, dict(own.latency) if latency else {})
