"""Pictures that are cheap to send and dear to open, recognised by their bytes before a decoder sees them.

A decoder's work is not bounded by a picture's pixels alone: each scan of a progressive JPEG passes over all of them
again, a few bytes of a compressed profile unpack to a megabyte, and Pillow reads segments, chunks and what lies between
them one by one, in Python. So these are counted here, by the rules by which libjpeg and Pillow read them. What is no
picture at all passes: the decoder says so better. (What EXIF directories and PNG texts may hold, Pillow bounds itself.)
"""

from __future__ import annotations

import re

MAX_SCANS = 200
MAX_PASSES = 24
"""How often the scans of a JPEG may pass over `max_pixels` pixels; ten scans of three colours, the usual, make 14."""
MAX_SEGMENTS = 2_000
MAX_CHUNKS = 20_000
MAX_COMPRESSED_CHUNKS = 64
MAX_EXIF_SEGMENTS = 32
MAX_JUNK_BYTES = 2**16
MAX_RLE_BYTES = 4 * 2**20

_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_BARE = frozenset({0x01, 0xC8, 0xD8, _EOI, *range(0xF0, 0xFE)})  # markers without a length
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # FF 00 and restarts are part of a scan, FF FF is padding


class BadPicture(ValueError):
    """A picture that is not taken; the message says why, in words for a quarantine table."""


class TooLarge(BadPicture):
    """A picture with more pixels, or of more work for its decoder, or a file with more bytes, than is allowed."""


def check(data: bytes, max_pixels: int) -> None:
    """Raise BadPicture if opening these bytes would cost far more than a plain picture of `max_pixels` pixels does."""
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data, max_pixels)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_webp(data)
    elif data[:2] == b"BM" and data[30:31] in (b"\1", b"\2") and len(data) > MAX_RLE_BYTES:
        raise TooLarge(f"a run-length encoded BMP with more than {MAX_RLE_BYTES:,} bytes; save it as PNG")


def _check_jpeg(data: bytes, max_pixels: int) -> None:
    at, segments, junk, scans, work, pixels, exif = 2, 0, 0, 0, 0, 0, 0
    while found := _MARKER.search(data, at):
        junk += 0 if scans else found.start() - at
        at, kind = found.end(), data[found.end() - 1]
        segments += 1
        _at_most(MAX_SEGMENTS, segments, "a JPEG", "segments")
        if kind == _EOI and scans:
            break
        if kind in _BARE:
            continue
        length = max(2, int.from_bytes(data[at : at + 2]))
        body = data[at + 2 : at + length]
        if kind in _SIZES and not pixels:
            pixels = int.from_bytes(body[1:3]) * int.from_bytes(body[3:5])
        elif kind == _SOS:
            scans += 1
            work += pixels * max(1, body[0] if body else 1)
            _at_most(MAX_SCANS, scans, "a JPEG", "scans", "a plain JPEG")
            _at_most(MAX_PASSES * max_pixels, work, "a JPEG", "samples in its scans together", "a plain JPEG")
        elif kind == _APP1 and body.startswith(b"Exif\0\0"):
            exif += 1
            _at_most(MAX_EXIF_SEGMENTS, exif, "a JPEG", "segments of EXIF")
        at += length
    _at_most(MAX_JUNK_BYTES, junk if scans else junk + len(data) - at, "a JPEG", "bytes between its segments")


def _check_png(data: bytes) -> None:
    at, chunks, compressed = 8, 0, 0
    while at < len(data) and (kind := data[at + 4 : at + 8]) != b"IEND":
        chunks += 1
        compressed += kind in (b"iCCP", b"zTXt", b"iTXt")
        _at_most(MAX_CHUNKS, chunks, "a PNG", "chunks")
        _at_most(MAX_COMPRESSED_CHUNKS, compressed, "a PNG", "compressed profiles and texts")
        at += 12 + int.from_bytes(data[at : at + 4])


def _check_webp(data: bytes) -> None:
    at, chunks, frames = 12, 0, 0
    while at < len(data):
        chunks += 1
        frames += data[at : at + 4] == b"ANMF"
        if frames > 1:
            raise BadPicture("an animated picture; only still ones are read")
        _at_most(MAX_SEGMENTS, chunks, "a WebP", "chunks")
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2


def _at_most(limit: int, found: int, kind: str, what: str, mend: str = "it without metadata") -> None:
    if found > limit:
        raise TooLarge(f"{kind} with more than {limit:,} {what}; save {mend}")
