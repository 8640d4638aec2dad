"""Choices drawn by a hash of what they are about: no other row, source or order of rows can move them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def draw(count: int, *parts: str) -> int:
    """A number below `count` that depends on `parts` alone."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big") % count


def drawn(counts: Iterable[int], *parts: str) -> list[int]:
    """A number below each of `counts`, all from one hash of `parts`; the product of the counts stays below 2**240."""
    rest = int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=32).digest(), "big")
    numbers = []
    for count in counts:
        rest, number = divmod(rest, count)
        numbers.append(number)
    return numbers
