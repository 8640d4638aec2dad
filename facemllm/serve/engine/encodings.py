"""What the tower said of the faces seen last, so that a second request about a picture needs no second look."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What the tower says of a face: its tokens (N, D), and the probabilities of its characteristics."""

    tokens_ND: Tensor
    characteristics: Mapping[str, float]


class Encodings:
    """The faces seen last, by their key, up to so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._held = most_bytes, 0
        self._seen: OrderedDict[tuple[str, ...], Seen] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: tuple[str, ...]) -> Seen | None:
        """What was seen of a face, if it is still held; counted as a hit or a miss."""
        found = self._seen.get(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            self._seen.move_to_end(key)
        return found

    def put(self, key: tuple[str, ...], seen: Seen) -> None:
        """Hold a face; those not asked about for longest go."""
        if key in self._seen:
            return
        self._seen[key] = seen
        self._held += seen.tokens_ND.nbytes
        while self._held > self._most:
            _, gone = self._seen.popitem(last=False)
            self._held -= gone.tokens_ND.nbytes
