"""Replies to requests, each asked once: from the store, else from whoever answers (a `Sender`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from facemllm.asking.link import Asked
from facemllm.asking.refusals import RowRefused
from facemllm.asking.store import Replies, Reply
from facemllm.core import digests

_QUALITY = 90  # of the JPEG that the model sees


class Sender(Protocol):
    """Gets replies and stores them. It may travel to other processes by pickling."""

    def send(self, asked: Sequence[Asked]) -> Sequence[Reply | Exception]:
        """A stored reply to each request, in order; an exception in the place of one refuses its row. Raises JobStopped
        when no request can be answered now."""


@dataclass(frozen=True)
class Wanted:
    """A reply that is wanted: about which picture, under which key, and how its request is made if it is needed."""

    image_id: str
    key: str
    request: Asked


def content_key(image_id: str, prompt_hash: str, model: str, parameters: Any) -> str:
    """The content key of a reply: picture, words, model, parameters."""
    return digests.of_json([image_id, prompt_hash, model, parameters])


def replies(home: Path, sender: Sender, wanted: Sequence[Wanted]) -> list[Reply | Exception]:
    """A reply, or why there is none, in the order of `wanted`. What was answered before comes from the store under
    `home`; the same question is put once. Raises JobStopped when no request can be answered now."""
    store = Replies(home)
    found: dict[str, Reply | Exception] = {}
    missing: dict[str, Asked] = {}
    for one in wanted:
        if one.key in found or one.key in missing:
            continue
        try:
            stored = store.read(one.image_id, one.key)
        except ValueError as error:  # an image_id that is none
            found[one.key] = RowRefused(str(error))
            continue
        if stored is not None:
            found[one.key] = stored
        else:
            missing[one.key] = one.request
    if missing:
        found |= zip(missing, sender.send(list(missing.values())), strict=True)
    return [found[one.key] for one in wanted]


def reduced(data: bytes, side: int) -> bytes:
    """A picture as JPEG, its longer side at most `side` pixels, without metadata. Raises RowRefused if it is none."""
    from facemllm.core import images

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
