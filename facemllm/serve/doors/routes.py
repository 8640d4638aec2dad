"""The routes of this server that are no protocol's of their own: V2 infer, the model, `/info`, and what is closed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from kserve.errors import ModelNotReady
from kserve.protocol.dataplane import DataPlane

from facemllm.serve.doors import infer

JSON_LENGTH = "Inference-Header-Content-Length"


def router(plane: DataPlane, info: Callable[[], dict[str, Any]], model: dict[str, Any]) -> APIRouter:
    """`info` is what GET /info gives, `model` how OpenAI's clients are told of the model."""
    routes = APIRouter()

    @routes.get("/info")
    async def give() -> dict[str, Any]:
        return info()

    @routes.get("/v1/models/{name}")
    async def give_model(name: str) -> dict[str, Any]:
        if not await plane.model_ready(name):
            raise ModelNotReady(name)
        return {"name": name, "ready": True, **model}

    @routes.post("/v2/models/{name}/infer", response_model=None)
    async def answer(name: str, request: Request) -> Response:
        if not await plane.model_ready(name, True):
            raise ModelNotReady(name)
        asked = infer.read_body(await request.body(), request.headers.get(JSON_LENGTH), name)
        response, _ = await plane.infer(name, asked, dict(request.headers))
        content, length = response.to_rest()
        if length is None:
            return JSONResponse(content)
        return Response(content, headers={JSON_LENGTH: str(length)}, media_type="application/octet-stream")

    @routes.post("/v2/repository/{rest:path}")
    async def closed(rest: str) -> None:
        raise NotImplementedError

    return routes
