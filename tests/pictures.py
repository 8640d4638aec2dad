"""Pictures as bytes: whole ones, and such as are cheap to send and dear to open."""

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def encode(picture: Image.Image | np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """A picture, or its pixels, in a file's bytes; `options` are Pillow's."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, data: bytes = b"", *, depth: int = 8, color: int = 2) -> bytes:
    """A PNG that claims a size and holds this `data`, whatever that is; `color` 2 is RGB, 0 grey."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")


def progressive(side: int) -> bytes:
    """A progressive JPEG, side x side, of one colour."""
    return encode(Image.new("RGB", (side, side), (200, 90, 60)), "JPEG", progressive=True)


def repeated_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG with one scan of its last refinements `count` times more: some thirty bytes each."""
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    end = data.rindex(b"\xff\xd9")
    scan = data[starts[-1] : end]
    return data[:end] + scan * count + data[end:]
