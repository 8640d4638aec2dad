"""What a verifier remembers of the decisions repository: the newest commit and the newest time that it has seen."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from facemllm.core.files import atomic_write, locked
from facemllm.signing.canonical import Refused, canonical, parse_time, time_text
from facemllm.signing.statements import SKEW


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint in a file; without one (None) nothing is remembered."""

    path: Path | None

    def check(self, place: str, commits: Collection[str], newest: datetime | None, now: datetime) -> None:
        """Raises Refused ("history") where `commits` lack the one seen before, ("clock") where time went back.

        `newest` is the time of the newest commit of the repository at `place`.
        """
        head, time = self._read()
        if head is not None and head not in commits:
            raise Refused(
                "history",
                f"{place} lacks commit {head}, seen here before: decisions were removed or rewritten; bring it back "
                f"(or remove {self.path} if this is another repository by intention)",
            )
        for known, what in ((time, f"the time last seen ({self.path})"), (newest, "the newest decision")):
            if known is not None and known > now + SKEW:
                here = f"it is {time_text(now)} here, before {what}, {time_text(known)}"
                raise Refused("clock", f"{here}; set the clock of this machine")

    def write(self, head: str | None, commits: Collection[str], now: datetime) -> None:
        """Remember `head`, the newest of `commits`, and the time. Raises UserError if it cannot be written."""
        if self.path is None:
            return
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            stored, time = self._read()
            if stored is not None and stored not in commits:  # another process has read further
                head = stored
            newest = now if time is None else max(now, time)
            if (head, newest) != (stored, time):
                atomic_write(self.path, canonical({"head": head, "time": time_text(newest)}))

    def _read(self) -> tuple[str | None, datetime | None]:
        if self.path is None or not self.path.exists():
            return None, None
        try:
            found = json.loads(self.path.read_bytes())
            head, time = found["head"], parse_time(found["time"])
            if head is not None and not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", head):
                raise ValueError(head)
        except (ValueError, TypeError, KeyError):
            raise Refused("history", f"{self.path} is damaged; restore it, or remove it to begin anew") from None
        return head, time
