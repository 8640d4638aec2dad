"""Pictures that are cheap to send and dear to open."""

import io
import re

from PIL import Image


def progressive(side: int) -> bytes:
    """A progressive JPEG, side x side, of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 90, 60)).save(buffer, "JPEG", progressive=True)
    return buffer.getvalue()


def repeated_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG with one scan of its last refinements `count` times more: some thirty bytes each."""
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    end = data.rindex(b"\xff\xd9")
    scan = data[starts[-1] : end]
    return data[:end] + scan * count + data[end:]
