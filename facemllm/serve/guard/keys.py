"""API keys: who may ask, and under which name.

`python -m facemllm.serve.guard.keys NAME` makes a key and prints it with its line for the keys file, which holds names
and SHA-256 of keys only. A file that changed is read again; one that cannot be read keeps the keys as they were.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from facemllm.errors import UserError
from facemllm.serve.caller import CALLER
from facemllm.serve.language import Refused
from facemllm.settings.serve import Guard

log = logging.getLogger("facemllm.serve")

OPEN_PATHS = re.compile(r"/|/page\.(css|js)|/metrics|/v2/health/(live|ready)|/v1/models/[^/:]+|/v2/models/[^/]+/ready")
"""What anyone may GET."""
OWN_PATHS = frozenset({"/", "/page/feedback"})
"""Forms of the page, which bring their key themselves."""
OPEN_METHODS = frozenset({"ServerLive", "ServerReady", "ModelReady", "Check", "Watch"})

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+([0-9a-f]{64})")
_MOST_BYTES = 2**20
_NEEDED = "an API key is needed: Authorization: Bearer KEY"
_UNKNOWN = "this API key is not known here"


class Keys:
    """The clients of a keys file: lines of a name and the SHA-256 of a key; `#` begins a comment. Raises UserError."""

    def __init__(self, path: Path) -> None:
        self._path, self._looked = path, time.monotonic()
        self._state = self._stamp()
        self._clients = _read(path)

    def client(self, authorization: str | None) -> str:
        """The client's name from `Bearer KEY`. Raises Refused (401). Every key is compared, in constant time."""
        self._refresh()
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Refused(401, _NEEDED)
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = [name for known, name in self._clients.items() if hmac.compare_digest(known, digest)]
        if not found:
            raise Refused(401, _UNKNOWN)
        return found[0]

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def _refresh(self) -> None:
        if time.monotonic() - self._looked < 1 or (state := self._stamp()) == self._state:
            return
        self._looked, self._state = time.monotonic(), state
        try:
            self._clients = _read(self._path)
        except UserError as error:
            log.error("the keys stay as they were: %s", error)


def _read(path: Path) -> Mapping[str, str]:
    """Names by the SHA-256 of keys."""
    try:
        data = path.read_bytes()[: _MOST_BYTES + 1]
    except OSError as error:
        raise UserError(f"the keys file {path} cannot be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise UserError(f"the keys file {path} has more than {_MOST_BYTES:,} bytes")
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path}, line {number}: must be a name and the SHA-256 of a key in hexadecimal digits")
        if match[2] in found:
            raise UserError(f"{path}, line {number}: this key is that of {found[match[2]]}, too")
        found[match[2]] = match[1]
    if not found:
        raise UserError(f"the keys file {path} holds no key; make one: python -m facemllm.serve.guard.keys NAME")
    return found


def guarded_by(guard: Guard) -> Keys | None:
    """The keys that a server asks for; None if it asks for none. Raises UserError for a file that cannot be read."""
    return Keys(Path(guard.keys).expanduser()) if guard.keys else None


def _is_open(method: str, path: str) -> bool:
    return path in OWN_PATHS if method == "POST" else method in ("GET", "HEAD") and bool(OPEN_PATHS.fullmatch(path))


def _name(client: str) -> None:
    CALLER.set(replace(CALLER.get(), client=client))


class KeyCheck:
    """ASGI middleware: a request without a known key is refused, but for health and metrics. `refuse` makes the answer
    to a refusal at a path."""

    def __init__(self, app: ASGIApp, keys: Keys, refuse: Callable[[str, Refused], ASGIApp]) -> None:
        self.app, self._keys, self._refuse = app, keys, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on in its client's name."""
        if scope["type"] == "http" and not _is_open(scope["method"], scope["path"]):
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            try:
                _name(self._keys.client(given[0].decode("latin-1") if len(given) == 1 else None))
            except Refused as refused:
                return await self._refuse(scope["path"], refused)(scope, receive, _challenging(send))
        return await self.app(scope, receive, send)


def _challenging(send: Send) -> Send:
    async def with_challenge(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"www-authenticate", b"Bearer")]
        await send(message)

    return with_challenge


def grpc_interceptor(keys: Keys) -> Any:
    """An interceptor of a gRPC server that ends calls without a known key in the metadata `authorization` with
    UNAUTHENTICATED, but for health."""
    import grpc
    from grpc_interceptor.server import AsyncServerInterceptor

    class KeyInterceptor(AsyncServerInterceptor):
        async def intercept(self, method: Any, request_or_iterator: Any, context: Any, method_name: str) -> Any:
            if method_name.rpartition("/")[2] not in OPEN_METHODS:
                given = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
                try:
                    _name(keys.client(str(given[0]) if len(given) == 1 else None))
                except Refused as refused:
                    context.set_code(grpc.StatusCode.UNAUTHENTICATED)
                    context.set_details(refused.reason)
                    return None
            response = method(request_or_iterator, context)
            return response if hasattr(response, "__aiter__") else await response

    return KeyInterceptor()


def made(name: str) -> tuple[str, str]:
    """A new key, and the line for the keys file. Raises UserError for a name that no file can hold."""
    key = f"fm-{secrets.token_urlsafe(32)}"
    line = f"{name} {hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.fullmatch(line):
        raise UserError("a client's name has letters, digits, '.', '_' and '-', 64 at most")
    return key, line


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m facemllm.serve.guard.keys NAME")
    try:
        print("key, to be shown once: {}\nline for the keys file:  {}".format(*made(sys.argv[1])))
    except UserError as problem:
        sys.exit(f"error: {problem}")
