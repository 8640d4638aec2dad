"""The encodings of the faces asked about last: a second request about a picture does not run the tower again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Encoding:
    """What the tower says of a face: its tokens (N, D), and the probabilities of its characteristics."""

    tokens_ND: Tensor
    characteristics: Mapping[str, float]


class Encodings:
    """The encodings used last, by the face's key, up to so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._held = most_bytes, 0
        self._entries: OrderedDict[tuple[str, ...], Encoding] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: tuple[str, ...]) -> Encoding | None:
        """The encoding of a face, if it is still held; counted as a hit or a miss."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            self._entries.move_to_end(key)
        return found

    def put(self, key: tuple[str, ...], encoding: Encoding) -> None:
        """Hold a face; those not asked about for longest go."""
        if key in self._entries:
            return
        self._entries[key] = encoding
        self._held += encoding.tokens_ND.nbytes
        while self._held > self._most:
            _, gone = self._entries.popitem(last=False)
            self._held -= gone.tokens_ND.nbytes
