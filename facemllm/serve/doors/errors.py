"""Every exception as one line, in the form of the door that was used; what is not meant for the client stays here."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from facemllm.serve.language import Refused

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

log = logging.getLogger("facemllm.serve")

INTERNAL = "internal error; the server's log has the details"
_CODES = {401: "invalid_api_key", 404: "model_not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}


def is_openai(path: str) -> bool:
    """Whether a path belongs to the OpenAI door."""
    return path.startswith("/openai/") or path == "/v1/chat/completions"


def openai_error(status: int, line: str) -> tuple[int, dict[str, Any]]:
    """Status and body of an error as OpenAI's clients read it."""
    status = 400 if status == 422 else status
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": line, "type": kind, "param": None, "code": _CODES.get(status)}}


def one_line(reason: str) -> str:
    """A reason in one short line."""
    return " ".join(reason.split())[:500]


def place(error: BaseException) -> str:
    """Where an exception came from; its own text may hold what a client sent, and stays out of logs."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "nowhere"


def refusal(path: str, refused: Refused) -> JSONResponse:
    """A refusal in the form of the door at a path."""
    return _response(path, refused.status, refused.reason, refused.retry_after)


def _response(
    path: str, status: int, reason: str, after: float | None, more: Mapping[str, str] | None = None
) -> JSONResponse:
    from fastapi.responses import JSONResponse

    body: dict[str, Any] = {"error": one_line(reason)}
    after = 1.0 if after is None and status in (429, 503) else after
    if is_openai(path):
        status, body = openai_error(status, one_line(reason))
    headers = dict(more or {}) if after is None else {"Retry-After": str(max(1, math.ceil(after)))}
    return JSONResponse(body, status_code=status, headers=headers)


def add_handlers(app: FastAPI) -> None:
    """Answer every exception with one line: `{"error": line}`, or OpenAI's form at its door."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from kserve import errors
    from starlette.exceptions import HTTPException

    def misfit(error: Any) -> tuple[int, str]:
        first = error.errors()[0]
        return 422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"

    answers: dict[type[Exception], Any] = {
        Refused: lambda error: (error.status, error.reason),
        errors.InvalidInput: lambda error: (400, str(error)),
        RequestValidationError: misfit,
        HTTPException: lambda error: (error.status_code, str(error.detail)),
        errors.ModelNotFound: lambda _: (404, "no such model; GET /v1/models lists them"),
        Exception: lambda _: (500, INTERNAL),
    }
    not_ready = (errors.ModelNotReady, errors.ServerNotReady, errors.ServerNotLive)
    answers |= dict.fromkeys(not_ready, lambda _: (503, "the model is not ready"))
    not_offered = (NotImplementedError, errors.UnsupportedProtocol)
    answers |= dict.fromkeys(not_offered, lambda _: (501, "not offered by this server"))

    def handler(kind: type[Exception]) -> Any:
        async def handle(request: Request, error: Exception) -> JSONResponse:
            status, reason = answers[kind](error)
            if kind is Refused:
                log.info("refused with %d", status)
            elif kind is Exception:
                log.error("%s while answering, %s", type(error).__name__, place(error))
            more = error.headers if isinstance(error, HTTPException) else None  # which methods are allowed
            return _response(request.url.path, status, reason, getattr(error, "retry_after", None), more)

        return handle

    for kind in answers:
        app.add_exception_handler(kind, handler(kind))
