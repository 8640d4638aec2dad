"""What stands before every route, in its order: the key, the size and time of the body, its JSON, its links."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from facemllm.serve.guard.bodies import BodyLimit
from facemllm.serve.guard.fetching import Fetcher
from facemllm.serve.guard.json_bodies import JsonLimit
from facemllm.serve.guard.keys import KeyCheck, Keys
from facemllm.serve.guard.links import FetchImages
from facemllm.serve.language import Refused
from facemllm.settings.operations import Guard

if TYPE_CHECKING:
    from starlette.applications import Starlette


def plain_refusal(path: str, refused: Refused) -> ASGIApp:
    """A refusal as `{"error": line}`, whatever the path."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(max(1, math.ceil(refused.retry_after)))}
    return JSONResponse({"error": " ".join(refused.reason.split())[:500]}, refused.status, headers)


def install(
    app: Starlette, guard: Guard, max_bytes: int, refuse: Callable[[str, Refused], ASGIApp] = plain_refusal
) -> None:
    """Add the middlewares to an application that does not run yet. `refuse` makes the answer to a refusal at a path.
    Raises UserError for a keys file that cannot be read."""
    keys = Keys(Path(guard.keys).expanduser()) if guard.keys else None
    if guard.fetch.hosts:
        fetcher = Fetcher(guard.fetch.hosts, max_bytes=max_bytes, seconds=guard.fetch.seconds)
        app.add_middleware(FetchImages, fetcher=fetcher, max_bytes=max_bytes, refuse=refuse)
    app.add_middleware(JsonLimit, max_depth=guard.json_depth, max_values=guard.json_values, refuse=refuse)
    app.add_middleware(BodyLimit, max_bytes=max_bytes, seconds=guard.body_s)
    if keys:  # the one added last comes first
        app.add_middleware(KeyCheck, keys=keys, refuse=refuse)
