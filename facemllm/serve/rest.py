"""KServe's REST server, made fit for strangers: our interface, our limits, and refusals of one line.

KServe as it comes listens on every interface, accepts bodies of any size, lets anyone unload the model, writes a stack
trace into the log for every bad request and tells the client the text of any exception.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve import errors
from kserve.protocol.rest.server import RESTServer
from starlette.exceptions import HTTPException

from facemllm.serve.policy import BodyLimit, Refused

log = logging.getLogger("facemllm.serve")


def rest_server(host: str, max_bytes: int, info: dict[str, Any]) -> type[RESTServer]:
    """A REST server class that KServe can use in place of its own; `info` is what GET /info tells."""

    class FaceRESTServer(RESTServer):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.config.host = host

        def _register_endpoints(self, app: FastAPI) -> None:
            @app.get("/info")
            async def tell() -> dict[str, Any]:
                return info

            @app.post("/v2/repository/{rest:path}")  # the first route wins: KServe's would load and unload the model
            async def closed(rest: str) -> None:
                raise NotImplementedError

            super()._register_endpoints(app)

        def _add_middlewares(self, app: FastAPI) -> None:
            app.add_middleware(BodyLimit, max_bytes=max_bytes)

        def _add_exception_handlers(self, app: FastAPI) -> None:
            add_handlers(app)

    return FaceRESTServer


def add_handlers(app: FastAPI) -> None:
    """Turn every exception into `{"error": line}`; what is not meant for the client stays in the log."""

    async def refused(_: Request, error: Any) -> JSONResponse:
        log.info("refused with %d", error.status)
        return _error(error.status, error.reason)

    async def bad_input(_: Request, error: Any) -> JSONResponse:
        return _error(400, str(error))

    async def misfit(_: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        return _error(422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")

    async def http(_: Request, error: Any) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    async def unknown_model(_: Request, error: Any) -> JSONResponse:
        return _error(404, "no such model; GET /v1/models lists them")

    async def not_ready(_: Request, error: Any) -> JSONResponse:
        return _error(503, "the model is not ready")

    async def not_offered(_: Request, error: Any) -> JSONResponse:
        return _error(501, "not offered by this server")

    async def broken(_: Request, error: Any) -> JSONResponse:
        log.error("%s while answering", type(error).__name__)
        return _error(500, "internal error; the server's log has the details")

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(errors.InvalidInput, bad_input)
    app.add_exception_handler(RequestValidationError, misfit)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(errors.ModelNotFound, unknown_model)
    for kind in (errors.ModelNotReady, errors.ServerNotReady, errors.ServerNotLive):
        app.add_exception_handler(kind, not_ready)
    for kind in (NotImplementedError, errors.UnsupportedProtocol):
        app.add_exception_handler(kind, not_offered)
    app.add_exception_handler(Exception, broken)


def _error(status: int, reason: str) -> JSONResponse:
    line = " ".join(reason.split())
    return JSONResponse({"error": line[:500]}, status_code=status)
