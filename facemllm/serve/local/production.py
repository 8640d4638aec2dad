"""Production's servers: one that serves, a second one beside it while a release tries another model, the proxy.

Whoever changes something holds the release lock. Two models are in memory during a release only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx

from facemllm.core import servers, services
from facemllm.core.files import locked
from facemllm.core.processes import Identity
from facemllm.core.routes import Routes
from facemllm.core.servers import BACKENDS, Deployed
from facemllm.errors import UserError
from facemllm.settings import Settings

_DRAIN_S = 60.0


@contextmanager
def held(settings: Settings) -> Iterator[None]:
    """Keep other releases away. Raises UserError when one is under way."""
    taken = "another release is under way; nothing was changed, look at `facemllm promote list` and try again"
    with locked(settings.home / "signing" / ".release.lock", taken):
        yield


def up(settings: Settings) -> services.Running:
    """Serve the model last released, and no other. Raises UserError as `services.up` does."""
    with held(settings):
        known = servers.deployed(settings, "production")
        if known is not None:
            if serving(settings) is None:
                known = _with_ports(settings, replace(known, name=known.name or BACKENDS[0]))
            _start(settings, known)
            servers.note_deployed(settings, "production", known)
        return services.up(settings, "production")


def serving(settings: Settings) -> Deployed | None:
    """The server that requests go to, if it runs. What a release that ended half-way left beside it is ended."""
    back(settings)
    known = servers.deployed(settings, "production")
    running = {row.name for row in services.status(settings) if row.state not in ("down", "orphaned")}
    return known if known is not None and known.name in running else None


def back(settings: Settings) -> None:
    """Send every request to the model that serves, and end the server beside it once it has answered what it began."""
    known = servers.deployed(settings, "production")
    if known is not None:
        servers.note_deployed(settings, "production", known)
    for name in BACKENDS:
        if known is None or not _runs(settings, name, known):
            drained(settings, name)
            services.down(settings, [name])


def _runs(settings: Settings, name: str, model: Deployed) -> bool:
    """Whether what was started under a name is the server of a model, whatever settings it was started with."""
    service = services.recorded(settings, name)
    same = service is not None and service.port == model.port and model.digest in service.command
    return same and name == model.name


def beside(settings: Settings, model: Deployed, before: Deployed | None) -> tuple[Deployed, services.Running]:
    """Start a model's server beside the one that serves; that one itself where it is the same in every way.

    It gets no request yet; where none serves, the proxy is stopped. Raises UserError when it does not start.
    """
    if before is None:
        services.down(settings, ["production"])
    if before is not None and before.digest == model.digest:
        same = replace(model, name=before.name, port=before.port, grpc_port=before.grpc_port)
        if services.recorded(settings, same.name) == _service(settings, same):
            return same, _start(settings, same)
    name = next(name for name in BACKENDS if before is None or name != before.name)
    new = _with_ports(settings, replace(model, name=name))
    if before is not None:
        share(settings, before, new, 0)
    return new, _start(settings, new)


def share(settings: Settings, stable: Deployed, canary: Deployed, percent: float) -> None:
    """Give a canary its share of the requests, for as long as this process lives."""
    Routes(stable, canary, percent, Identity.of(os.getpid())).write(servers.note_of(settings, "production"))


def drained(settings: Settings, name: str) -> None:
    """Wait a while until a server that gets no more requests has answered all, and its gRPC clients have connected
    elsewhere, as `serve.guard.grpc_age_s` makes them."""
    end = time.monotonic() + _DRAIN_S
    while time.monotonic() < end:
        try:
            meter = counts(settings)["backends"].get(name, {})
        except UserError:
            return  # without a proxy it has got none
        if not meter.get("in_flight") and not meter.get("tunnels"):
            return
        time.sleep(0.1)


def counts(settings: Settings) -> dict[str, Any]:
    """What the proxy has counted so far. Raises UserError when it does not answer."""
    url = f"{servers.proxy(settings).url}/proxy/status"
    try:
        found: dict[str, Any] = httpx.get(url, timeout=10, trust_env=False).raise_for_status().json()
        return found
    except (httpx.HTTPError, ValueError) as error:
        raise UserError(f"production's proxy does not answer at {url}: {error}") from None


def _with_ports(settings: Settings, model: Deployed) -> Deployed:
    """Ports for its server that are free now: those it had, if they are."""
    port, grpc_port = servers.free_port(settings, model.port), 0
    if servers.production_grpc_port(settings):
        grpc_port = servers.free_port(settings, model.grpc_port, port)
    return replace(model, port=port, grpc_port=grpc_port)


def _service(settings: Settings, model: Deployed) -> services.Service:
    ports = (model.port, model.grpc_port) if model.grpc_port else (model.port,)
    return servers.model_server(settings, model.name, model.model, model.digest, model.version, *ports)


def _start(settings: Settings, model: Deployed) -> services.Running:
    return services.up(settings, model.name, _service(settings, model))
