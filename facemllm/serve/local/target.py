"""This machine as a target: model servers on loopback, production's behind its proxy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import httpx

from facemllm.core import servers, services
from facemllm.core.servers import Deployed
from facemllm.errors import UserError
from facemllm.serve.canary import Side
from facemllm.serve.local import production
from facemllm.serve.target import Endpoint
from facemllm.settings import Settings

_ANSWER_S = 120.0


class Local:
    """Staging and production of this machine."""

    keeps_adopted = False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._before: Deployed | None = None
        self._new: Deployed | None = None

    def held(self) -> AbstractContextManager[None]:
        """The release lock."""
        return production.held(self._settings)

    def serving(self) -> Deployed | None:
        """The server that requests go to, if it runs."""
        return production.serving(self._settings)

    def put(self, model: Deployed, before: Deployed | None) -> Endpoint:
        """Start a model's server beside the one that serves."""
        self._before = before
        self._new, running = production.beside(self._settings, model, before)
        adopted = before is not None and self._new.name == before.name
        name = self._settings.promote.model_name
        return Endpoint("production", self._new.url, name, model.digest, running.pid, adopted)

    def split(self) -> LocalSplit:
        """The proxy, between the two servers."""
        assert self._before is not None
        assert self._new is not None
        services.up(self._settings, "production", servers.proxy(self._settings))
        return LocalSplit(self._settings, self._before, self._new)

    def keep(self) -> str:
        """The proxy sends every request to the new server, and the former one ends."""
        assert self._new is not None
        door = services.up(self._settings, "production", servers.proxy(self._settings))
        servers.note_deployed(self._settings, "production", self._new)
        production.back(self._settings)  # which ends the former one, now that it gets no request
        return door.url

    def back(self) -> None:
        """The proxy sends every request to the former server, and the new one ends."""
        production.back(self._settings)

    def down(self) -> None:
        """End production's servers and its proxy."""
        services.down(self._settings, ["production"])

    def stage(self, model: Deployed) -> Endpoint:
        """Start staging's server."""
        service = servers.model_server(self._settings, "staging", model.model, model.digest, model.version)
        running = services.up(self._settings, "staging", service)
        name = self._settings.promote.model_name
        return Endpoint("staging", running.url, name, model.digest, running.pid, running.adopted)

    def unstage(self) -> None:
        """End staging's server."""
        services.down(self._settings, ["staging"])

    def staged(self, model: Deployed) -> None:
        """Note it, from where `services up` can start it again."""
        servers.note_deployed(self._settings, "staging", model)


class LocalSplit:
    """Requests through production's proxy, which counts what its two servers do."""

    def __init__(self, settings: Settings, stable: Deployed, canary: Deployed) -> None:
        self._settings, self._both = settings, (stable, canary)
        self._url = f"{servers.proxy(settings).url}/v1/models/{settings.promote.model_name}:predict"
        self._first: Mapping[str, Any] = {}
        self._client = httpx.Client(headers=servers.authorization(), timeout=_ANSWER_S, trust_env=False)

    def share(self, percent: float) -> None:
        """Write the proxy's routes, and remember what it has counted so far."""
        production.share(self._settings, *self._both, percent)
        self._first = production.counts(self._settings)

    def sides(self, *, latency: bool) -> tuple[Side, Side]:
        """What the proxy has counted since. Raises UserError where it was restarted meanwhile."""
        now = production.counts(self._settings)
        if now["started"] != self._first["started"]:
            raise UserError("production's proxy was restarted meanwhile, and what it had counted is lost")
        stable, canary = (side(self._first, now, one.name, latency=latency) for one in self._both)
        return stable, canary

    def ask(self, canary: bool, body: Any) -> httpx.Response | None:
        """Post a question through the proxy, which is told whom it is for."""
        return self._client.post(self._url, json=body, headers={"X-Backend": self._both[canary].name})

    def close(self) -> None:
        """End the connections."""
        self._client.close()


def side(first: Mapping[str, Any], now: Mapping[str, Any], name: str, *, latency: bool) -> Side:
    """What a server did between two answers of `/proxy/status`."""
    before, after = first["backends"].get(name, {}), now["backends"].get(name, {})
    edges = Counter(after.get("latency", {}))
    edges.subtract(before.get("latency", {}))
    times = {float(edge): count for edge, count in edges.items() if count} if latency else {}
    requests, errors = (after.get(key, 0) - before.get(key, 0) for key in ("requests", "errors"))
    return Side(requests, errors, times)
