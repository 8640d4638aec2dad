"""A stand-in for KServe and Knative on the stand-in API server: revisions of an InferenceService, and its traffic.

What it does with `canaryTrafficPercent`, tags and the revisions that were rolled out last is what KServe's
`ksvc_reconciler.go` and `inference_service_status.go` do. Each revision is a server that `start` makes; requests
reach it through a proxy on loopback: one port for production, one a tag. `observedGeneration` is the Knative Service's,
as with KServe, and so another number than the InferenceService's own generation.
"""

from __future__ import annotations

import http.client
import json
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.answering import Answering, Loopback
from tests.kubernetes_server import Body, Cluster


class Server(Protocol):
    """A revision's pod: where it answers once it is ready, and its end."""

    port: int

    def stop(self) -> None: ...


class CannotStart(Exception):
    """Why a revision's pod does not get ready, as Knative says it."""


@dataclass
class Revision:
    name: str
    template: str
    server: Server | None = None
    failure: str = ""
    answered: int = 0


@dataclass
class Service:
    """One InferenceService: its revisions in order, the proxies, and what the Knative Service beneath counts. While the
    newest revision has `fails_at` percent, its machine is broken: every question is answered with 500."""

    revisions: dict[str, Revision] = field(default_factory=dict)
    proxies: dict[str, Loopback] = field(default_factory=dict)
    traffic: list[Body] = field(default_factory=list)
    generation: int = 0
    percents: list[int | None] = field(default_factory=list)
    fails_at: int | None = None


class KServe:
    """The controller. `start(InferenceService)` returns a revision's server once it is ready, None for one that never
    is, or raises CannotStart. While `paused`, nothing is reconciled."""

    def __init__(self, cluster: Cluster, start: Callable[[Body], Server | None]) -> None:
        self.cluster, self.start, self.paused = cluster, start, False
        self.services: dict[tuple[str, str], Service] = {}
        self._todo: queue.Queue[tuple[str, str] | None] = queue.Queue()
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()
        cluster.on("InferenceService", lambda what, body: self.look(body["metadata"]))

    def look(self, metadata: Body) -> None:
        """Have one reconciled."""
        self._todo.put((metadata["namespace"], metadata["name"]))

    def service(self, namespace: str, name: str) -> Service:
        return self.services[namespace, name]

    def _work(self) -> None:
        while (key := self._todo.get()) is not None:
            body = self.cluster.get("InferenceService", key[1], key[0])
            if body is None:
                if service := self.services.pop(key, None):
                    self._end(service)
            elif not self.paused:
                self._reconcile(key, body)

    def _reconcile(self, key: tuple[str, str], body: Body) -> None:
        service = self.services.setdefault(key, Service())
        service.generation += 1
        predictor = dict(body["spec"]["predictor"])
        service.percents.append(predictor.pop("canaryTrafficPercent", None))
        template = json.dumps([predictor, body["metadata"].get("annotations")], sort_keys=True)
        newest = next(reversed(service.revisions.values()), None)
        if newest is None or newest.template != template:
            name = f"{key[1]}-predictor-{len(service.revisions) + 1:05d}"
            revision = service.revisions[name] = Revision(name, template)
            self._settle(key, service)
            try:
                revision.server = self.start(body)
            except CannotStart as error:
                revision.failure = str(error)
        self._settle(key, service)

    def _settle(self, key: tuple[str, str], service: Service) -> None:
        """Route, and tell the status, until neither changes the other any more."""
        namespace, name = key
        for _ in range(4):
            body = self.cluster.get("InferenceService", name, namespace)
            if body is None:
                return
            known = body.get("status", {}).get("components", {}).get("predictor", {})
            created = next(reversed(service.revisions))
            ready = next((one.name for one in reversed(service.revisions.values()) if one.server), "")
            rolled = known.get("latestRolledoutRevision", "")
            percent = body["spec"]["predictor"].get("canaryTrafficPercent")
            tags = body["metadata"].get("annotations", {}).get("serving.kserve.io/enable-tag-routing") == "true"
            service.traffic = self._traffic(service, ready, rolled, percent, tags) if ready else []
            predictor = propagated(known, service.traffic, created, ready)
            condition = self._condition(service, created, ready)
            if ready:
                url = self._url(service, "")
                predictor |= {"url": url, "address": {"url": url}}
            status: Body = {
                "observedGeneration": 40 + service.generation,
                "components": {"predictor": predictor},
                "conditions": [{"type": one, **condition} for one in ("PredictorReady", "Ready")],
                "deploymentMode": "Knative",
            }
            if ready:
                status |= {"url": self._url(service, ""), "address": {"url": self._url(service, "")}}
            self.cluster.set_status("InferenceService", name, namespace, **status)
            if predictor.get("latestRolledoutRevision", "") == rolled:
                return

    def _traffic(self, service: Service, ready: str, rolled: str, percent: int | None, tags: bool) -> list[Body]:
        latest = {"latestRevision": True, "revisionName": ready, **({"tag": "latest"} if tags else {})}
        shares = [latest | {"percent": 100}]
        if percent is not None and rolled:
            shares = [latest | {"percent": percent}]
            if percent < 100:
                left = {"latestRevision": False, "revisionName": rolled, "percent": 100 - percent, "tag": "prev"}
                shares.append(left)
        return [one | ({"url": self._url(service, str(one["tag"]))} if "tag" in one else {}) for one in shares]

    def _condition(self, service: Service, created: str, ready: str) -> Body:
        if failure := service.revisions[created].failure:
            return {"status": "False", "reason": "RevisionFailed", "message": f'Revision "{created}" failed: {failure}'}
        if created != ready:
            return {"status": "Unknown", "reason": "RevisionMissing", "message": "Configuration is waiting"}
        return {"status": "True"}

    def _url(self, service: Service, tag: str) -> str:
        if tag not in service.proxies:
            service.proxies[tag] = Loopback(_Proxy, service=service, tag=tag).start()
        return service.proxies[tag].url

    def _end(self, service: Service) -> None:
        for proxy in service.proxies.values():
            proxy.stop()
        for revision in service.revisions.values():
            if revision.server is not None:
                revision.server.stop()

    def close(self) -> None:
        """End every server, and wait for those that are starting."""
        self._todo.put(None)
        self._worker.join()
        for service in self.services.values():
            self._end(service)


def propagated(known: Body, traffic: list[Body], created: str, ready: str) -> Body:
    """`InferenceServiceStatus.PropagateStatus` of KServe, as far as revisions go."""
    found = {**known, "latestCreatedRevision": created}
    by_revision: Counter[str] = Counter()
    for one in traffic:
        by_revision[one["revisionName"]] += one["percent"]
    for one in traffic:
        if not (one["revisionName"] == ready and one["latestRevision"]):
            continue
        if found.get("latestRolledoutRevision", "") != ready:
            if one["percent"] == 100:
                found["previousRolledoutRevision"] = found.get("latestRolledoutRevision", "")
                found["latestRolledoutRevision"] = ready
        elif ready == created and one["percent"] < 100 == by_revision[ready] and found.get("previousRolledoutRevision"):
            found["latestRolledoutRevision"] = found["previousRolledoutRevision"]
    return found | {"latestReadyRevision": ready, "traffic": traffic}


class _Proxy(Answering):
    service: Service
    tag: str

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        targets = [one for one in self.service.traffic if not self.tag or one.get("tag") == self.tag]
        status, kind, content = 503, "text/plain", b"no healthy upstream"
        if targets:
            weights = [1 if self.tag else one["percent"] for one in targets]
            chosen = random.choices(targets, weights if any(weights) else None)[0]
            revision = self.service.revisions[chosen["revisionName"]]
            if not self.tag and self.command == "POST":
                revision.answered += 1
            fails = self.service.fails_at is not None and self.service.fails_at == self.service.percents[-1]
            if fails and chosen["latestRevision"] and self.command == "POST":
                status, content = 500, b"broken"
            else:
                status, kind, content = self._answer(revision, body)
        self._send(status, content, kind)

    def _answer(self, revision: Revision, body: bytes) -> tuple[int, str, bytes]:
        assert revision.server is not None
        connection = http.client.HTTPConnection("127.0.0.1", revision.server.port, timeout=120)
        try:
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")
            }
            connection.request(self.command, self.path, body or None, headers)
            reply = connection.getresponse()
            return reply.status, reply.headers.get("Content-Type", ""), reply.read()
        except OSError:
            return 503, "text/plain", b"upstream connect error"
        finally:
            connection.close()

    do_GET = do_POST = _pass


class FakeServer:
    """A model server in this process: `kind` is equal, failing, slow, different or lying (about its digest)."""

    def __init__(self, digest: str, kind: str = "equal") -> None:
        self.digest, self.kind = digest, kind
        self.requests: Counter[str] = Counter()
        self._server = Loopback(_Model, server_=self).start()
        self.port = self._server.server_port

    def stop(self) -> None:
        self._server.stop()


class _Model(Answering):
    server_: FakeServer

    def _say(self, status: int, content: Any) -> None:
        self._send(status, content.encode() if isinstance(content, str) else json.dumps(content).encode())

    def do_GET(self) -> None:
        if self.path == "/metrics":
            counted = self.server_.requests.items()
            lines = [f'facemllm_requests_total{{door="v1",status="{status}"}} {count}' for status, count in counted]
            return self._say(200, "\n".join(["# TYPE facemllm_requests counter", *lines, ""]))
        return self._say(200, {"digest": "f" * 64 if self.server_.kind == "lying" else self.server_.digest})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["instances"][0]["question"]
        kind, number = self.server_.kind, self.server_.requests.total()
        if kind == "slow":
            time.sleep(0.03)
        status = 500 if kind == "failing" and number % 2 else 200
        self.server_.requests[str(status)] += 1
        if status == 500:
            return self._say(500, {"error": "internal error"})
        said = "yes" if kind == "different" and "hat" not in asked else "no"
        return self._say(200, {"predictions": [{"answer": said, "value": said, "kind": "taught"}]})
