"""Which server a request goes to."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

from facemllm.core.routes import Routes
from facemllm.core.servers import Deployed

_OWNER_S = 0.25


class Router:
    """Chooses servers by the routes in a file; the last good ones are kept where it cannot be read."""

    def __init__(self, path: Path, chance: random.Random | None = None) -> None:
        self._path, self._chance = path, chance or random.Random()
        self._stat: tuple[int, int, int] | None = None
        self._routes: Routes | None = None
        self._driven, self._asked = False, 0.0

    def look(self) -> tuple[Routes | None, bool]:
        """The routes of this moment, and whether their canary is driven by a living process."""
        with contextlib.suppress(OSError):
            found = self._path.stat()
            stat = found.st_ino, found.st_mtime_ns, found.st_size
            if stat != self._stat:
                self._routes, self._stat, self._asked = Routes.read(self._path) or self._routes, stat, 0.0
        if self._routes is not None and time.monotonic() - self._asked > _OWNER_S:
            self._driven, self._asked = self._routes.driven(), time.monotonic()
        return self._routes, self._driven

    def order(self, wanted: str | None = None) -> list[Deployed]:
        """Servers to try, the first one by the canary's share; or the one of that name alone, if requests go to it."""
        routes, driven = self.look()
        if routes is None:
            return []
        known = [routes.stable, *([routes.canary] if driven and routes.canary else [])]
        if wanted is not None:
            return [one for one in known if one.name == wanted]
        first = len(known) == 2 and self._chance.random() * 100 < routes.percent
        return known[::-1] if first else known
