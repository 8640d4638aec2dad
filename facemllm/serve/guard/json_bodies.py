"""JSON that every parser reads alike, and that costs little to read.

A parser of its own choice stands behind each protocol: some keep the last of two equal keys, some read NaN or 1e999,
some stop at a thousand levels with an exception. So a body is checked before any of them sees it.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from starlette.types import ASGIApp, Receive, Scope, Send

from facemllm.serve.guard.bodies import given_again
from facemllm.serve.guard.keys import OWN_PATHS
from facemllm.serve.language import Refused

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_OTHER = bytes(sorted(set(range(256)) - set(b"[]{},")))
_STEPS = bytes.maketrans(b"[{]},", b"\1\1\xff\xff\0")  # by which a sign changes the level, as int8
_LONG_BODY = 2**18  # is checked in a thread
_JSON_LENGTH, _MOST_DIGITS = b"inference-header-content-length", 12


def check_json(body: bytes, max_depth: int, max_values: int) -> None:
    """Raise Refused (400, or 413 for too much) unless a body is JSON of at most so many levels and values, without
    equal keys in one object and without numbers that no float can hold."""
    # without an escape, what stands between every other pair of quotes is no string; much faster for a long picture
    outside = _STRING.sub(b"", body) if b"\\" in body else b"".join(body.split(b'"')[::2])
    signs = outside.translate(None, _OTHER)
    if (values := 1 + signs.count(b"[") + signs.count(b"{") + signs.count(b",")) > max_values:
        raise Refused(413, f"the body holds {values} values; this server takes {max_values}")
    levels = np.cumsum(np.frombuffer(signs.translate(_STEPS), np.int8), dtype=np.int64)
    if levels.max(initial=0) > max_depth:
        raise Refused(400, f"the body is nested {levels.max()} levels deep; this server reads {max_depth}")
    try:
        json.loads(body, object_pairs_hook=unique, parse_constant=_no_number, parse_float=_finite)
    except Refused:
        raise
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not valid JSON") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of pairs. Raises Refused (400) for a name that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise Refused(400, f"the body says {json.dumps(twice[:40])} twice in one object")
    return found


def _no_number(text: str) -> NoReturn:
    raise Refused(400, f"the body holds {text}, which is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise Refused(400, f"the body holds the number {text[:40]}, which is too large")
    return value


class JsonLimit:
    """ASGI middleware: a body that is not plain JSON within limits (`check_json`) is refused before a route sees it.

    Only the page's forms pass unread, whatever a body says that it is; of V2's bodies with binary tensors the JSON part
    is checked.
    `refuse` makes the answer to a refusal at a path. It stands inside `BodyLimit`, which bounds the bytes.
    """

    def __init__(
        self, app: ASGIApp, max_depth: int, max_values: int, refuse: Callable[[str, Refused], ASGIApp]
    ) -> None:
        self.app, self._max_depth, self._max_values, self._refuse = app, max_depth, max_values, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, check it, and pass the request on."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        try:
            pieces: list[bytes] = []
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                pieces.append(message.get("body", b""))
                if not message.get("more_body", False):
                    break
            body = b"".join(pieces)
            path = scope["path"]
            if path not in OWN_PATHS and (part := self._json_part(body, path, dict(scope["headers"]))):
                check = (part, self._max_depth, self._max_values)
                await asyncio.to_thread(check_json, *check) if len(part) > _LONG_BODY else check_json(*check)
        except Refused as refused:
            return await self._refuse(scope["path"], refused)(scope, receive, send)
        whole = {"type": "http.request", "body": body, "more_body": False}
        return await self.app(scope, given_again(whole, receive), send)

    def _json_part(self, body: bytes, path: str, headers: dict[bytes, bytes]) -> bytes:
        if any(name.startswith(b"ce-") for name in headers):  # KServe's reader of them fails on what is not one
            raise Refused(415, "CloudEvents are not read; send plain JSON, without ce- headers")
        length = headers.get(_JSON_LENGTH)
        if length is None or not path.endswith("/infer"):
            return body
        if not length.isdigit() or len(length) > _MOST_DIGITS or int(length) > len(body):
            raise Refused(400, "Inference-Header-Content-Length must be the length of the JSON before the tensors")
        return body[: int(length)]
