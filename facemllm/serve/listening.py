"""KServe's ModelServer on our terms: our doors first, one host for REST and gRPC, one drain for both.

Nothing of KServe is replaced by name: its classes are extended where it leaves a choice. It would listen on every
interface, let anyone load or unload the model, say that it is ready whatever its model says, load a model that left
service when it is asked over gRPC, and go on taking gRPC calls until REST is drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kserve import ModelServer
from kserve.errors import ModelNotReady
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.rest.server import RESTServer, _RefreshingServer
from kserve.protocol.rest.v1_endpoints import V1Endpoints
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from facemllm.serve.caller import EndsWithCaller, NamedCaller
from facemllm.serve.doors.errors import add_handlers, refusal
from facemllm.serve.doors.grpc import Grpc
from facemllm.serve.guard import connections, middleware
from facemllm.serve.observer import Watch
from facemllm.serve.service import Served, Service
from facemllm.settings.serve import Guard

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

    from facemllm.serve.predictor import FaceModel

_PREDICT = "/v1/models/{model_name}:predict"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


@dataclass(frozen=True)
class Listening:
    """Where a server listens: `grpc_port` 0 is no gRPC. After SIGTERM it is no longer ready, takes requests for
    `linger_s` seconds more, and then has `grace_s` to end those in flight."""

    host: str
    port: int
    grpc_port: int
    guard: Guard
    max_bytes: int
    linger_s: float
    grace_s: int


class FaceServer(ModelServer):
    """Serves one model. `routers` makes the routes of our doors, which come before KServe's."""

    def __init__(self, at: Listening, routers: Callable[[DataPlane], Sequence[APIRouter]]) -> None:
        super().__init__(
            http_port=at.port,
            grpc_port=at.grpc_port,
            enable_grpc=at.grpc_port > 0,
            enable_latency_logging=False,
            grace_period=at.grace_s,
        )
        self._at, self._routers, self._draining = at, routers, False
        self.dataplane = Plane(self.registered_models, lambda: not self._draining)

    def start(self, models: Sequence[FaceModel]) -> None:
        """Serve until SIGTERM."""
        (model,) = models
        self.register_model(model)
        asyncio.run(self._run(model.service))

    async def _run(self, service: Service) -> None:
        at, stop = self._at, asyncio.Event()
        for one in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(one, stop.set)
        rest = Rest(self.dataplane, self.model_repository_extension, at, self._routers(self.dataplane), service)
        servers: list[Coroutine[Any, Any, None]] = [rest.start()]
        grpc = None
        if at.grpc_port:
            where = (at.host, at.grpc_port, at.guard, at.max_bytes, at.grace_s)
            grpc = Grpc(self.dataplane, self.model_repository_extension, *where, observer=service.observer)
            servers.append(grpc.start())
        running = [asyncio.create_task(one) for one in servers]
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([*running, stopped], return_when=asyncio.FIRST_COMPLETED)
        self._draining = True
        if stop.is_set():
            await asyncio.sleep(at.linger_s)
        rest.end()
        if grpc:
            await grpc.stop()
        await asyncio.gather(*running)


class Plane(DataPlane):
    """What KServe's own routes and gRPC ask: ready only while the model is and the server `takes` requests."""

    def __init__(self, registry: Any, takes: Callable[[], bool]) -> None:
        super().__init__(registry)
        self._takes = takes

    async def ready(self) -> bool:
        """Whether new requests should come."""
        models = self.model_registry.get_models().values()
        return self._takes() and all([await model.healthy() for model in models])

    async def model_ready(self, model_name: str, disable_predictor_health_check: bool = False) -> bool:
        """Whether a model is ready, and, unless a request asks that is here already, new requests should come."""
        found = await super().model_ready(model_name, True)
        return found and (disable_predictor_health_check or self._takes())

    async def get_model(self, name: str) -> Any:
        """The model. Raises ModelNotFound, and ModelNotReady where KServe would load it."""
        model = self.get_model_from_registry(name)
        if not await model.healthy():
            raise ModelNotReady(name)
        return model

    def metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return {**super().metadata(), "name": "facemllm", "extensions": ["binary_tensor_data"]}


class _Uvicorn(_RefreshingServer):
    """Uvicorn that leaves signals to the model server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Rest(RESTServer):
    """KServe's REST server on one host, with our doors before its own."""

    def __init__(
        self,
        plane: DataPlane,
        extension: Any,
        at: Listening,
        routers: Sequence[APIRouter],
        service: Service,
    ) -> None:
        super().__init__("kserve.model_server:app", plane, extension, at.port, grace_period=at.grace_s)
        self.config.host = at.host
        connections.apply(self.config, at.guard)
        self._server = _Uvicorn(self.config)
        self._routers, self._at, self._service = routers, at, service

    def end(self) -> None:
        """Take no more connections, and end when the requests in flight have ended."""
        self._server.should_exit = True

    def _register_endpoints(self, app: FastAPI) -> None:
        # the first route that fits answers; behind the others, the one that is asked most would be looked for longest
        predict = V1Endpoints(self.dataplane, self.model_repository_extension).predict
        app.add_api_route(_PREDICT, predict, methods=["POST"], response_model=None, include_in_schema=False)
        for router in self._routers:
            app.include_router(router)
        super()._register_endpoints(app)

    def _add_middlewares(self, app: FastAPI) -> None:
        app.add_middleware(EndsWithCaller)
        at = self._at
        middleware.install(app, at.guard, at.max_bytes, refusal, self._service.check, at.host)
        app.add_middleware(NamedCaller)
        app.add_middleware(Labelled, served=self._service.model)
        app.add_middleware(Watch, observer=self._service.observer)

    def _add_exception_handlers(self, app: FastAPI) -> None:
        add_handlers(app)


class Labelled:
    """ASGI middleware: every answer names the model by version and digest in its headers."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self.app, self._served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Model-Digest"] = self._served.digest
                headers["X-Model-Version"] = self._served.version or ""
            await send(message)

        await self.app(scope, receive, labelled if scope["type"] == "http" else send)
