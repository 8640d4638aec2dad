"""What all doors read alike: JSON, texts, and the pictures of a request."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import orjson

from facemllm.serve.guard.images import check_image, read_image, read_map
from facemllm.serve.language import Encoded, Limits, Refused


def read_json(body: bytes) -> Any:
    """What a JSON body holds. Raises Refused (400), also for one that is nested too deep."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Refused(400, "the body is not valid JSON") from None


def read_text(value: Any, where: str, limits: Limits) -> str:
    """Check a question's text. Raises Refused."""
    if not isinstance(value, str) or not value.strip():
        raise Refused(422, f"{where} must be a text")
    if len(value) > limits.max_question_chars:
        raise Refused(422, f"{where} has {len(value)} characters; this server takes {limits.max_question_chars}")
    return value.strip()


def read_names(task: Any, item: Any, where: str, limits: Limits) -> tuple[str, str | None]:
    """Check the names of a task and, if not empty, of one of its items. Raises Refused."""
    if not all(isinstance(name, str) and len(name) <= limits.max_question_chars for name in (task, item or "")):
        raise Refused(422, f"{where}: task and item must be names")
    return task, item or None


def _is_file(data: bytes) -> bool:
    """Whether data are those of a picture, not of its base64 (no picture has a base64 that begins with BM)."""
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM")) or (
        data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    )


class Pictures:
    """The pictures of one request: each is checked once, and their pixels are counted together."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, dict[tuple[str, str | bytes], Encoded]()

    def image(self, source: Any, where: str) -> Encoded:
        """A picture from `{"b64": "<base64 of the file>"}`. Raises Refused."""
        if not isinstance(source, Mapping) or set(source) != {"b64"}:
            raise Refused(422, f'{where} must be {{"b64": "<base64 of the file>"}}')
        return self.base64(source["b64"], f"{where}.b64")

    def base64(self, text: Any, where: str) -> Encoded:
        """A picture from base64. Raises Refused."""
        key = ("image", text if isinstance(text, str) else "")
        return self._kept(key) or self._keep(key, read_image(text, where, self._limits))

    def file(self, data: bytes, where: str) -> Encoded:
        """A picture from the bytes of a file, or of base64. Raises Refused."""
        key = ("image", data)
        if not _is_file(data):
            return self.base64(data.decode("latin-1"), where)
        return self._kept(key) or self._keep(key, check_image(data, where, self._limits))

    def map(self, source: Any, where: str) -> Encoded:
        """A map of face parts from `{"b64": "<base64 of a PNG>"}`. Raises Refused."""
        if not isinstance(source, Mapping) or set(source) != {"b64"} or not isinstance(source["b64"], str):
            raise Refused(422, f'{where} must be {{"b64": "<base64 of a PNG>"}}')
        return self.base64_map(source["b64"], f"{where}.b64")

    def base64_map(self, text: str, where: str) -> Encoded:
        """A map of face parts from base64. Raises Refused."""
        key = ("map", text)  # a picture sent as both is checked as both
        return self._kept(key) or self._keep(key, read_map(text, where, self._limits))

    def file_map(self, data: bytes, where: str) -> Encoded:
        """A map of face parts from the bytes of a file, or of base64. Raises Refused."""
        return self.base64_map(base64.b64encode(data).decode() if _is_file(data) else data.decode("latin-1"), where)

    def _kept(self, key: tuple[str, str | bytes]) -> Encoded | None:
        return self._held.get(key)

    def _keep(self, key: tuple[str, str | bytes], found: Encoded) -> Encoded:
        self._held[key] = found
        if (pixels := sum(one.width * one.height for one in self._held.values())) > self._limits.max_pixels:
            most = self._limits.max_pixels
            raise Refused(413, f"the images hold {pixels} pixels; this server takes {most} a request")
        return found
