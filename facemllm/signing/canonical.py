"""JSON that means one thing: read strictly within bounds, written in its canonical form (RFC 8785)."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any, NoReturn

import rfc8785

from facemllm.errors import UserError

LARGEST = 65_536
"""Bytes of a statement's envelope and of its payload."""
DEEPEST = 16
"""Levels of nesting that JSON from outside may have."""
HEX = re.compile(r"[0-9a-f]{64}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


class Refused(UserError):
    """Something does not count, or nothing may be served. `check` is the one check that failed, in one word.

    `statement` is the id of the statement that it is about, where it is one that was verified.
    """

    check: str

    def __init__(self, check: str, message: str, statement: str | None = None):
        super().__init__(message)
        self.check = check
        self.statement = statement


def canonical(value: Any) -> bytes:
    """The canonical JSON of a value. Raises UserError for what has none: numbers beyond 2**53, NaN, lone surrogates."""
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise UserError(f"no canonical JSON: {error}; use text, booleans and whole numbers up to 2**53") from None


def parse(data: bytes, what: str, largest: int = LARGEST, deepest: int = DEEPEST) -> Any:
    """What strict JSON holds: UTF-8, no key twice, no NaN, at most `largest` bytes and `deepest` levels.

    Raises Refused ("too_large", "malformed"), naming `what`.
    """
    if len(data) > largest:
        raise Refused("too_large", f"{what}: {len(data)} bytes; at most {largest} are read")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Refused("malformed", f"{what}: not UTF-8 text") from None
    except RecursionError:
        raise Refused("malformed", f"{what}: nested deeper than {deepest} levels") from None
    except ValueError as error:
        raise Refused("malformed", f"{what}: not strict JSON, {error}") from None
    if _deeper(value, deepest):
        raise Refused("malformed", f"{what}: nested deeper than {deepest} levels")
    return value


def parse_canonical(data: bytes, what: str, largest: int = LARGEST, deepest: int = DEEPEST) -> Any:
    """What JSON holds that is its own canonical form, so that no reader can see it otherwise. Raises as `parse`."""
    value = parse(data, what, largest, deepest)
    try:
        same = canonical(value) == data
    except UserError:
        same = False
    if not same:
        raise Refused("malformed", f"{what}: not in canonical form (RFC 8785)")
    return value


def utc_now() -> datetime:
    """The present time in UTC, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def time_text(time: datetime) -> str:
    """A time in UTC as statements and policies write it, `2026-11-29T08:00:00Z`."""
    return time.astimezone(UTC).strftime(_TIME)


def parse_time(text: Any) -> datetime:
    """The time that `time_text` wrote. Raises ValueError for anything else."""
    time = datetime.strptime(text, _TIME).replace(tzinfo=UTC) if isinstance(text, str) else None
    if time is None or time_text(time) != text:
        raise ValueError(f"{text!r} is no time such as 2026-11-29T08:00:00Z")
    return time


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _deeper(value: Any, levels: int) -> bool:
    below = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return below is not None and (levels == 0 or any(_deeper(one, levels - 1) for one in below))
