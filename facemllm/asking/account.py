"""What a job has asked for and used up, ever: counters that all its processes share, and the strict budget over them.

An account is named by model, words and parameters: one reply store, one account each. Its counters are one small
file that is read and rewritten in one piece under a lock, so they outlive any process that is killed. Before a request
goes out it is reserved, together with as many tokens as it may use; afterwards the reservation is settled with what the
answer says it used, or given back when the endpoint refused the request. A reservation whose outcome nobody learns
(the answer did not come, the process died) stays charged: it may have been paid for. So requests never exceed
`max_requests`, nor tokens `max_tokens`, as long as a request uses no more than `most_tokens` says; the largest prompt
seen corrects that bound, since how many tokens a picture is worth is the model's secret until it answers.

Imports nothing beyond the standard library: the courier has to start fast.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from facemllm.asking.store import folder


@dataclass(frozen=True)
class Counters:
    """Sums over all jobs of an account.

    `requests` went out and may have been paid for; `answered` of them were; `refused` ones came back with an error and
    are not among them. `repairs` and `retries` are requests, too. `in_doubt` ones were sent, and no answer came or was
    stored. `unmetered` answers do not say what they used. `held` are tokens of requests that are under way, in doubt,
    or unmetered. `largest` is the largest prompt so far, in tokens.
    """

    requests: int = 0
    answered: int = 0
    refused: int = 0
    repairs: int = 0
    retries: int = 0
    in_doubt: int = 0
    unmetered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    held: int = 0
    largest: int = 0

    @property
    def tokens(self) -> int:
        """Tokens used, or perhaps used."""
        return self.prompt_tokens + self.completion_tokens + self.held

    def less(self, before: Counters) -> Counters:
        """What has been added since `before`."""
        return Counters(*(now - then for now, then in zip(_values(self), _values(before), strict=True)))


_LAYOUT = struct.Struct(f"<{len(Counters.__dataclass_fields__)}q")


class Account:
    """The counters of one account, shared with every other process that opens it."""

    def __init__(self, home: Path, name: str) -> None:
        self.path = folder(home) / name / "counters"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def read(self) -> Counters:
        """The counters now."""
        with self._locked():
            return self._read()

    def add(self, **counts: int) -> None:
        """Add to counters by name."""
        with self._locked():
            now = self._read()
            self._write(replace(now, **{name: getattr(now, name) + count for name, count in counts.items()}))

    def reserve(self, prompt: int, completion: int, max_requests: int | None, max_tokens: int | None) -> int | str:
        """Set one request aside that may use so many tokens: the tokens that are held for it, to settle with.

        When the budget does not allow it nothing is set aside, and the name of the limit is given.
        """
        with self._locked():
            now = self._read()
            hold = max(prompt, now.largest) + completion
            if max_requests is not None and now.requests + 1 > max_requests:
                return "max_requests"
            if max_tokens is not None and now.tokens + hold > max_tokens:
                return "max_tokens"
            self._write(replace(now, requests=now.requests + 1, held=now.held + hold))
            return hold

    def settle(self, hold: int, prompt: int | None, completion: int | None) -> None:
        """A reserved request was answered and used so many tokens; unknown ones stay held."""
        if prompt is None or completion is None:
            self.add(answered=1, unmetered=1)
            return
        with self._locked():
            now = self._read()
            self._write(
                replace(
                    now,
                    answered=now.answered + 1,
                    prompt_tokens=now.prompt_tokens + prompt,
                    completion_tokens=now.completion_tokens + completion,
                    held=now.held - hold,
                    largest=max(now.largest, prompt),
                )
            )

    def give_back(self, hold: int) -> None:
        """A reserved request was refused by the endpoint, or never reached it: it is not paid for."""
        self.add(requests=-1, held=-hold, refused=1)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read(self) -> Counters:
        data = os.pread(self._file, _LAYOUT.size, 0)
        return Counters(*_LAYOUT.unpack(data)) if len(data) == _LAYOUT.size else Counters()

    def _write(self, counters: Counters) -> None:
        os.pwrite(self._file, _LAYOUT.pack(*_values(counters)), 0)


def _values(counters: Counters) -> tuple[int, ...]:
    return tuple(asdict(counters).values())


def most_tokens(text: str, image_side: int) -> int:
    """More tokens than a prompt with a picture should use: one for two bytes of text, one for 14 x 14 pixels."""
    return len(text.encode()) // 2 + (-(-image_side // 14)) ** 2
