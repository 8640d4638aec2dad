"""A slow and breaking road to a server."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Road:
    """A TCP road to a server at `target`: at most `rate` bytes a second, both ways and all connections together.

    `passed` bytes went by. It breaks one connection, once, when so many bytes have gone by as `breaks_at` says, and
    calls `then` once when so many have gone by as `at` says.
    """

    target: int
    rate: float
    breaks_at: float = float("inf")
    at: float = float("inf")
    then: Callable[[], object] = lambda: None
    passed: int = 0
    broken: int = 0
    port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free: float = 0.0
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _account(self, count: int) -> tuple[float, bool]:
        """How long to wait after so many bytes, and whether the connection is to break."""
        with self._lock:
            now = time.monotonic()
            self._free = max(self._free, now) + count / self.rate
            self.passed += count
            if self.passed >= self.at:
                self.at = float("inf")
                self._start(self.then)
            broken = self.passed >= self.breaks_at
            if broken:
                self.breaks_at, self.broken = float("inf"), self.broken + 1
            return self._free - now, broken

    def _start(self, work: Callable[..., object], *args: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))
        self._threads[-1].start()

    def _carry(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target)) as far:
            other = {near: far, far: near}
            while True:
                for one in select.select([*other], [], [])[0]:
                    data = one.recv(1 << 19)
                    wait, broken = self._account(len(data))
                    if broken or not data:
                        return
                    time.sleep(max(wait, 0))
                    other[one].sendall(data)

    @contextlib.contextmanager
    def open(self) -> Iterator["Road"]:
        """The road, open on a port of its own."""
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
            self.port = listening.getsockname()[1]

            def take() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        self._start(self._carry, listening.accept()[0])

            self._start(take)
            try:
                yield self
            finally:
                listening.shutdown(socket.SHUT_RDWR)
