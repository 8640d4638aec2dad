"""What the formats share: picture files named by their content, JSON lists written one entry at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from facemllm.core import digests
from facemllm.errors import UserError

_NAME = re.compile(r"[0-9a-f]{64}")
_KINDS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"BM", "bmp"), (b"RIFF", "webp"))


class Pictures:
    """A folder of pictures, each written once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder

    def names(self, row: Mapping[str, Any]) -> list[str]:
        """Write the pictures of a row of `conversations`; their file names, the first being its image_id."""
        found = []
        for number, image in enumerate(row["images"]):
            data = image["bytes"] or b""
            name = row["image_id"] if number == 0 else digests.of_bytes(data)
            if not _NAME.fullmatch(name):
                raise UserError(f"image_id '{name}' is no SHA-256 in hex; make the conversations again")
            kind = next((kind for start, kind in _KINDS if data.startswith(start)), "jpg")
            path = self._folder / f"{name}.{kind}"
            if not path.exists():
                path.write_bytes(data)
            found.append(path.name)
        return found


class JsonList:
    """A JSON list in a file, one entry a line; between `head` and `tail` when it stands inside of something."""

    def __init__(self, path: Path, head: str = "[", tail: str = "]\n") -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write(head)
        self._tail, self._first = tail, True

    def add(self, entry: Any, key: str | None = None) -> None:
        """Append an entry, under a key if it stands in an object."""
        named = "" if key is None else f"{json.dumps(key)}: "
        self._file.write(("\n" if self._first else ",\n") + named + json.dumps(entry, ensure_ascii=False))
        self._first = False

    def close(self) -> None:
        """End the list."""
        if not self._file.closed:
            self._file.write("\n" + self._tail)
            self._file.close()


def texts(row: Mapping[str, Any]) -> list[str]:
    """The words of every message of a row of `conversations`."""
    return [" ".join(p["text"] for p in message["content"] if p["type"] == "text") for message in row["messages"]]


def marked(words: Sequence[str], pictures: int) -> list[str] | None:
    """Texts with one `<image>` for every picture before the first; None when a text holds that mark already."""
    if any("<image>" in text for text in words):
        return None
    return ["<image>\n" * pictures + words[0], *words[1:]] if words else None
