"""What is asked of a model, who answers, and why there may be no reply: for one row, or for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from typing import Any, Protocol

from facemllm.core import digests, images
from facemllm.errors import UserError

_QUALITY = 90  # of the JPEG that the model sees


class RowRefused(Exception):
    """A row that cannot be described; the message is the reason, in words for the quarantine table."""


class Filtered(RowRefused):
    """A row that the endpoint's content filter declines. Asked again, it would be declined again."""


class TooLong(RowRefused):
    """A row that becomes more tokens than the model reads."""


def too_long(longest: int) -> TooLong:
    """Of a row, for a model that reads so many tokens."""
    return TooLong(f"more than the {longest:,} tokens that the model reads (max_position_embeddings)")


class JobStopped(UserError):
    """Nothing more can be described now (a failing endpoint, a spent budget): the message is what is wrong and how to
    mend it. It ends the job, keeping what is done; it never sends a row to quarantine."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked: the words, the picture as JPEG, `others` that stand behind it in the same message, and the names
    under which the reply is kept."""

    image_id: str
    key: str
    prompt_hash: str
    messages: list[dict[str, str]]
    picture: bytes = field(repr=False)
    repair: bool = False
    others: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def pictures(self) -> tuple[bytes, ...]:
        """All pictures, in order."""
        return (self.picture, *self.others)


MakeRequest = Callable[[], Request]
"""Makes a request when it is its turn, so that pictures do not wait in memory. It may raise RowRefused."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply as it came. `text` is None when it could not be kept, and `error` says why. Tokens are None when the
    answer did not count them. `time` is UTC; `cost` is at the prices of that time."""

    key: str
    image_id: str
    model: str
    prompt_hash: str
    text: str | None
    error: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str = ""
    seconds: float = 0.0
    time: str = ""
    cost: float | None = None

    @property
    def cut_off(self) -> bool:
        """Whether it ended where it was, at `max_tokens`."""
        return self.finish.lower() in ("length", "max_tokens")

    @classmethod
    def now(cls, request: Request, model: str, seconds: float, **said: Any) -> Reply:
        """The reply to a request that has just come, after so many seconds."""
        names: dict[str, Any] = {name: getattr(request, name) for name in ("key", "image_id", "prompt_hash")}
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(model=model, seconds=round(seconds, 3), time=time, **names, **said)


class Sender(Protocol):
    """Gets replies and stores them. It may travel to other processes by pickling."""

    def send(self, requests: Sequence[MakeRequest]) -> Sequence[Reply | Exception]:
        """A stored reply to each request, in order; an exception in the place of one refuses its row. Raises JobStopped
        when no request can be answered now."""


def content_key(image_id: str, prompt_hash: str, model: str, parameters: Any) -> str:
    """The content key of a reply: picture, words, model, parameters."""
    return digests.of_json([image_id, prompt_hash, model, parameters])


def reduced(data: bytes, side: int) -> bytes:
    """A picture as JPEG, its longer side at most `side` pixels, without metadata. Raises RowRefused if it is none."""
    try:
        return encoded(images.opened(data), side)
    except images.BadPicture as bad:
        raise RowRefused(f"the picture cannot be used: {bad}") from None


def encoded(picture: Any, side: int) -> bytes:
    """A decoded picture (PIL, RGB) as a model is sent it: JPEG, its longer side at most `side` pixels."""
    from PIL import Image

    if max(picture.size) > side:
        scale = side / max(picture.size)
        size = [max(1, round(length * scale)) for length in picture.size]
        picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.getvalue()
