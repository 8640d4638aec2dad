"""What is counted of each server: by production's proxy of those behind it, by a release of those that it asks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_STEP = 1.05  # of the latency histogram: its figures are exact to five percent


@dataclass
class Meter:
    """`requests` are those that ended, well or with an error; `errors` are 5xx, connections that were refused and
    answers that broke off. Busy ones (429) and those whose client left are counted apart. `latency` is the time to an
    answer's first byte: seconds, rounded up by five percent at most, to how many; errors are not in it. `in_flight` and
    `tunnels` (open connections of gRPC) are of this moment."""

    requests: int = 0
    errors: int = 0
    refused: int = 0
    broken: int = 0
    busy: int = 0
    left: int = 0
    in_flight: int = 0
    tunnels: int = 0
    latency: Counter[float] = field(default_factory=Counter)

    def answered(self, status: int, seconds: float) -> None:
        """An answer came whole."""
        if status == 429:
            self.busy += 1
            return
        self.requests += 1
        if status >= 500:
            self.errors += 1
        else:
            self.latency[bucket(seconds)] += 1

    def failed(self, *, refused: bool) -> None:
        """No connection was to be had, or none that lasted until the answer's end."""
        self.requests += 1
        self.errors += 1
        self.refused += refused
        self.broken += not refused

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self) | {"latency": {str(edge): count for edge, count in sorted(self.latency.items())}}


def bucket(seconds: float) -> float:
    """The histogram's upper edge above a time."""
    return round(_STEP ** math.ceil(math.log(max(seconds, 1e-4), _STEP)), 6)
