"""What the HTTP stand-ins of tests have in common."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Answering(BaseHTTPRequestHandler):
    """Keeps connections open, writes nothing on standard error, and sends whole bodies."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""

    def _send(
        self, status: int, content: bytes, kind: str = "application/json", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Loopback(ThreadingHTTPServer):
    """Answers on a free port of loopback within the block, or from `start` to `stop`; its handlers have `shared`."""

    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler], **shared: Any) -> None:
        super().__init__(("127.0.0.1", 0), type("Handler", (handler,), shared))
        self.url = f"http://127.0.0.1:{self.server_port}"

    def start(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    __enter__, __exit__ = start, stop
