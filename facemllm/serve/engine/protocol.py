"""What a server asks of an engine: a prepared face and questions in, scores and texts out. Without torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from facemllm.serve.engine.room import IDLE, UnderWay

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from facemllm.model.inference import Query, Scored

Chat = Sequence[tuple[str, str]]
"""(role, text) by turns, the last one the user's."""


@dataclass(frozen=True)
class Prepared:
    """A face as the model sees it: pixels (S, S, 3) uint8 and the map of its parts (S, S) uint8, if there is one.

    `key` holds the digests of what it was made of (image, map, box): the same key, the same face. `facts` are those
    of `asked.quality.measure`.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    map: NDArray[np.uint8] | None = field(repr=False)
    key: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """Answers about one face: to its closed questions, then to its open ones, each in order. `characteristics` has the
    probability of each by name, none unless they were asked for."""

    scored: tuple[Scored, ...]
    texts: tuple[str, ...]
    characteristics: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A model that answers, whatever computes it."""

    takes_maps: bool
    characteristic_names: tuple[str, ...]

    def check(self, *, client: str, deadline: float, under_way: UnderWay = IDLE) -> None:
        """Raise Refused (429, 503) where `answer` would now, or once the requests `under_way` in the server have come
        to it: to be asked before a body is read."""

    async def answer(
        self,
        face: Prepared,
        closed: Sequence[Query],
        open_: Sequence[Chat],
        *,
        characteristics: bool,
        client: str,
        deadline: float,
    ) -> Found:
        """All answers about one face. `deadline` is of `time.monotonic()`, in seconds.

        Raises Refused: 429 when too much waits, 504 when the deadline passes, 422 for a chat that is no chat, 413 for
        one that the model cannot hold. What a cancelled caller asked for is dropped.
        """

    def stream(self, face: Prepared, chat: Chat, *, client: str, deadline: float) -> AsyncIterator[str]:
        """The answer to a chat in pieces, as they are written; joined, they are what `answer` gives. Raises as it."""
