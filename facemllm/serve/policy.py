"""What a request may hold, and how it is refused.

Everything from outside is taken for hostile: bodies are cut off at a size, images come as base64 only (nothing is ever
fetched), their format is found from their content, and their pixels are counted before one is decoded. A refusal is
`Refused`: an HTTP status and one line that says what to change; it reaches the client as `{"error": line}`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import codecs
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from facemllm.core import digests, images
from facemllm.tables.schemas import SEGMENTATION

MIN_SIDE = 8
MAX_RATIO = 8
MAX_MESSAGES = 16
_PNG_BITS = 24  # where the header of a PNG has its bits a pixel
_BODY_SECONDS = 60.0
_DISCARD_BYTES = 64 * 2**20
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # those of UTF-32 begin alike, or with zeros
_FIELDS = frozenset({"image", "question", "task", "item", "messages", "segmentation", "characteristics"})


class Refused(Exception):
    """A request that is not answered: HTTP status and one line for the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Limits:
    """How much a request may hold. `max_pixels` counts all its images together."""

    max_body_mb: float
    max_pixels: int
    max_question_chars: int
    max_instances: int


@dataclass(frozen=True)
class Encoded:
    """An image that passed every check short of decoding."""

    data: bytes
    width: int
    height: int
    digest: str


@dataclass(frozen=True)
class Ask:
    """One instance of a request: an image, and a question, the name of an item, or a chat that ends in a question.

    `map` is a map of the face's parts; `characteristics` asks for the scores beside the answer.
    """

    image: Encoded
    question: str | None
    task: str | None = None
    item: str | None = None
    chat: tuple[tuple[str, str], ...] = ()
    map: Encoded | None = None
    characteristics: bool = False


def read_request(payload: Any, limits: Limits) -> list[Ask]:
    """The questions of a `:predict` body. Raises Refused (422 for its shape, 400 for an image)."""
    if not isinstance(payload, Mapping) or set(payload) != {"instances"}:
        raise Refused(422, 'the body must be {"instances": [...]} and hold nothing else')
    instances = payload["instances"]
    if not isinstance(instances, list) or not instances:
        raise Refused(422, "instances must be a list of at least one object")
    if len(instances) > limits.max_instances:
        raise Refused(413, f"{len(instances)} instances; this server takes {limits.max_instances} a request")
    held: dict[str, Encoded] = {}
    asks = [_read_instance(value, f"instances[{n}]", limits, held) for n, value in enumerate(instances)]
    if (pixels := sum(image.width * image.height for image in held.values())) > limits.max_pixels:
        raise Refused(413, f"the images hold {pixels} pixels; this server takes {limits.max_pixels} a request")
    return asks


def read_image(text: Any, where: str, limits: Limits) -> Encoded:
    """Check a base64 image up to its header. Raises Refused."""
    if not isinstance(text, str) or not text:
        raise Refused(422, f"{where} must be the image as base64 text; images are not fetched from addresses")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"{where} is not valid base64 (no line breaks, no data: prefix)") from None
    try:
        size = images.checked(data, limits.max_pixels).size
    except images.TooLarge as error:
        raise Refused(413, f"{where} is too large ({error}); this server takes {limits.max_pixels} pixels") from None
    except images.BadPicture as error:
        raise Refused(400, f"{where} cannot be read: {error}") from None
    short, long = sorted(size)
    if short < MIN_SIDE or long > short * MAX_RATIO:
        needed = f"needed are {MIN_SIDE} or more a side, at most 1:{MAX_RATIO}"
        raise Refused(400, f"{where} has {size[0]}x{size[1]} pixels; {needed}")
    return Encoded(data, *size, digests.of_bytes(data))


def read_map(text: Any, where: str, limits: Limits) -> Encoded:
    """Check a map of face parts, a base64 PNG of class numbers, up to its header. Raises Refused."""
    found = read_image(text, where, limits)
    if (picture := images.checked(found.data, limits.max_pixels)).format != "PNG":
        raise Refused(422, f"{where} is a {picture.format}; a map of face parts has to be a PNG, which loses nothing")
    # at fewer bits grey values are scaled up when they are read, and are class numbers no more
    if picture.mode not in ("L", "P") or (picture.mode == "L" and found.data[_PNG_BITS] != 8):
        raise Refused(422, f"{where} is no map of face parts: one 8-bit class number a pixel, grey or palette")
    return found


def decode_map(found: Encoded, image: Image.Image) -> NDArray[np.uint8]:
    """Class numbers of a checked map, (height, width), that belongs to a decoded image. Raises Refused (422)."""
    if abs(found.width * image.height - found.height * image.width) > max(found.width, found.height):
        sizes = f"{found.width}x{found.height} pixels, the image {image.width}x{image.height}"
        raise Refused(422, f"segmentation has {sizes}: other proportions")
    try:
        with Image.open(io.BytesIO(found.data), formats=("PNG",)) as picture:
            classes_HW = np.asarray(picture)
    except Exception:  # damaged data can raise almost anything from a decoder
        raise Refused(422, "segmentation cannot be read: its data are damaged") from None
    if (most := int(classes_HW.max(initial=0))) >= len(SEGMENTATION):
        raise Refused(422, f"segmentation holds the class {most}; there are {len(SEGMENTATION)}, from 0 to 18")
    return classes_HW


def decode(image: Encoded) -> Image.Image:
    """Decode a checked image, upright, in RGB. Raises Refused if its data is broken."""
    try:
        return images.opened(image.data)
    except images.BadPicture as error:
        raise Refused(400, f"the image cannot be read: {error}") from None


def read_question(value: Any, where: str, limits: Limits) -> str:
    """Check a question's text. Raises Refused."""
    if not isinstance(value, str) or not value.strip():
        raise Refused(422, f"{where} must be a text")
    if len(value) > limits.max_question_chars:
        raise Refused(422, f"{where} has {len(value)} characters; this server takes {limits.max_question_chars}")
    return value.strip()


def _read_instance(value: Any, where: str, limits: Limits, held: dict[str, Encoded]) -> Ask:
    ask = _read_question(value, where, limits, held)
    wants = value.get("characteristics", False)
    if not isinstance(wants, bool):
        raise Refused(422, f"{where}.characteristics must be true or false")
    found = None
    if "segmentation" in value:
        source = value["segmentation"]
        if not isinstance(source, Mapping) or set(source) != {"b64"} or not isinstance(source["b64"], str):
            raise Refused(422, f'{where}.segmentation must be {{"b64": "<base64 of a PNG>"}}')
        key = f"segmentation {source['b64']}"  # a picture sent as both is checked as both
        if key not in held:
            held[key] = read_map(source["b64"], f"{where}.segmentation.b64", limits)
        found = held[key]
    return replace(ask, map=found, characteristics=wants)


def _read_question(value: Any, where: str, limits: Limits, held: dict[str, Encoded]) -> Ask:
    if not isinstance(value, Mapping):
        raise Refused(422, f"{where} must be an object")
    if unknown := sorted(set(value) - _FIELDS):
        raise Refused(422, f"{where}: unknown field '{unknown[0][:40]}'; known are {', '.join(sorted(_FIELDS))}")
    if sum(key in value for key in ("question", "task", "messages")) != 1:
        raise Refused(422, f"{where}: give exactly one of question, task and messages")
    if "item" in value and "task" not in value:
        raise Refused(422, f"{where}: item needs task")
    source: Any = value.get("image")
    chat: tuple[tuple[str, str], ...] = ()
    if "messages" in value:
        source, chat = _read_chat(value["messages"], f"{where}.messages", source, limits)
    if not isinstance(source, Mapping) or set(source) != {"b64"}:
        raise Refused(422, f'{where}.image must be {{"b64": "<base64 of the file>"}}')
    key = source["b64"] if isinstance(source["b64"], str) else ""
    if key not in held:
        held[key] = read_image(source["b64"], f"{where}.image.b64", limits)
    if chat:
        return Ask(held[key], chat[-1][1] if len(chat) == 1 else None, chat=chat)
    if "question" in value:
        return Ask(held[key], read_question(value["question"], f"{where}.question", limits))
    names = [value["task"], value.get("item", "")]
    if not all(isinstance(name, str) and len(name) <= limits.max_question_chars for name in names):
        raise Refused(422, f"{where}: task and item must be names")
    return Ask(held[key], None, names[0], names[1] or None)


def _read_chat(messages: Any, where: str, source: Any, limits: Limits) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """The image of a chat (in its first message, or beside it) and its turns, as (role, text)."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise Refused(422, f"{where} must be a list of 1 to {MAX_MESSAGES} messages")
    pictures = [source] if source is not None else []
    chat = []
    for n, message in enumerate(messages):
        role = ("user", "assistant")[n % 2]
        here = f"{where}[{n}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"} or message["role"] != role:
            raise Refused(422, f'{here} must be {{"role": "{role}", "content": ...}}: user and assistant alternate')
        content = message["content"]
        texts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else _parts(content, here):
            if set(part) == {"type", "text"} and part["type"] == "text":
                texts.append(part["text"])
            elif set(part) == {"type", "b64"} and part["type"] == "image" and n == 0:
                pictures.append({"b64": part["b64"]})
            else:
                parts = '{"type": "text", "text"} or, in the first message, {"type": "image", "b64"}'
                raise Refused(422, f"{here}.content: parts are {parts}")
        if len(texts) != 1:
            raise Refused(422, f"{here} must hold one text")
        chat.append((role, read_question(texts[0], f"{here}.content", limits)))
    if len(chat) % 2 == 0:
        raise Refused(422, f"{where} must end with a question of the user")
    if len(pictures) != 1:
        raise Refused(422, f"{where} needs exactly one image, in its first message or beside it; found {len(pictures)}")
    return pictures[0], tuple(chat)


def _parts(content: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise Refused(422, f"{where}.content must be a text or a list of parts")
    return content


def _unsupported(form: str) -> Refused:
    return Refused(415, f"the body is {form}; send it as plain JSON in UTF-8")


class BodyLimit:
    """ASGI middleware: a body that is too large, too slow in coming, compressed or in UTF-16 or UTF-32 is refused
    without being held in memory. The mark before UTF-8 that some editors write is taken away.

    Most clients read the answer only when they have sent everything, and see a broken connection when it is closed
    before. So a body that is not enormous is read to its end, and thrown away, before it is refused.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size, whole, deadline = 0, False, time.monotonic() + _BODY_SECONDS
        headers = dict(scope["headers"])
        declared, encoding = headers.get(b"content-length", b""), headers.get(b"content-encoding", b"").strip().lower()
        fault: Refused | None = None
        if encoding not in (b"", b"identity"):
            fault = _unsupported(f"compressed (Content-Encoding: {encoding.decode('latin-1')[:40]})")
        enormous = self.max_bytes + _DISCARD_BYTES

        async def counted() -> Message:
            nonlocal size, whole, fault
            if declared.isdigit() and int(declared) > enormous:
                raise self._refused()
            while not whole:
                try:
                    message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    raise Refused(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None
                body = message.get("body", b"")
                if not size and fault is None and (b"\0" in body[:4] or body.startswith(_WIDE)):
                    fault = _unsupported("in UTF-16 or UTF-32")
                if not size and body.startswith(codecs.BOM_UTF8):
                    message["body"] = body.removeprefix(codecs.BOM_UTF8)
                size += len(body)
                whole = not message.get("more_body", False)
                if size <= self.max_bytes and fault is None:
                    return message
                if whole or size > enormous:
                    raise fault if size <= self.max_bytes and fault is not None else self._refused()
            return await receive()

        return await self.app(scope, counted, send)

    def _refused(self) -> Refused:
        return Refused(413, f"the body is too large; this server takes {self.max_bytes / 2**20:g} MB")
