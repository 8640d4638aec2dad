"""Maps of face parts for the eye: the colours of the classes, and a map's PNG with them in place of its numbers."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from facemllm.tables.schemas import SEGMENTATION

COLOURS = (
    *("#000000", "#d9a066", "#8f563b", "#5b6ee1", "#37946e", "#6abe30", "#663931", "#323c39", "#d77bba", "#76428a"),
    *("#ac3232", "#d95763", "#df7126", "#4b3a6e", "#306082", "#fbf236", "#639bff", "#cbdbfc", "#847e87"),
)
"""A colour a class, by its number; the background is left clear."""
_WORDS = {f"{side[0]}_{part}": f"{side} {part}" for side in ("left", "right") for part in ("eye", "brow", "ear")}
_WORDS |= {"eye_g": "glasses", "mouth": "inside of the mouth", "u_lip": "upper lip", "l_lip": "lower lip"}
_WORDS |= {"ear_r": "earring", "neck_l": "necklace", "cloth": "clothes"}
_SIGN = b"\x89PNG\r\n\x1a\n"
_PALETTE = 3  # the colour type of PNGs whose numbers stand for colours


def legend() -> list[tuple[str, str]]:
    """The classes in words with their colours, without the background."""
    return [(_WORDS.get(name, name), colour) for name, colour in zip(SEGMENTATION[1:], COLOURS[1:], strict=True)]


def coloured(png: bytes) -> bytes:
    """The PNG of a checked map (grey of 8 bits, or palette) with the classes' colours, its background clear.

    Its numbers stay as they are: a grey PNG of 8 bits and one of a palette differ in their header alone, so nothing is
    decoded. Only header, colours and pixels go on. Raises ValueError where it is no such PNG.
    """
    palette = b"".join(bytes.fromhex(colour[1:]) for colour in COLOURS)
    out = [_SIGN]
    for kind, data in _chunks(png):
        if kind == b"IHDR":
            width, height, bits, colour, *rest = struct.unpack(">IIBBBBB", data)
            if colour != _PALETTE and (bits, colour) != (8, 0):
                raise ValueError("no map of class numbers")
            out.append(_chunk(kind, struct.pack(">IIBBBBB", width, height, bits, _PALETTE, *rest)))
            out += [_chunk(b"PLTE", palette[: 3 * 2**bits]), _chunk(b"tRNS", b"\0")]
        elif kind in (b"IDAT", b"IEND"):
            out.append(_chunk(kind, data))
    return b"".join(out)


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_SIGN)
    while at + 12 <= len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
