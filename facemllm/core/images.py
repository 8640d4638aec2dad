"""Pictures from outside, hostile until checked: what may be opened, and as what it leaves here.

The format is found from the content, never from the name; pixels, and the work of decoding them (`core.bombs`), are
counted before one is decoded; what comes out is always an upright 8-bit RGB picture, encoded anew, so that no metadata,
appended archive or odd mode travels on. And the one perceptual hash by which importing, forgetting and validation know
a picture again.
"""

from __future__ import annotations

import io
import struct
import time
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from facemllm.core import bombs
from facemllm.core.bombs import BadPicture, TooLarge
from facemllm.errors import one_line

__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "BadPicture", "TooLarge", "TooSlow", "checked", "encoded", "opened"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
QUALITY = 95
_EXIF_ORIENTATION = 0x0112
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_SIDE, _LOW = 64, 16
_PIECE_BYTES = 2**14  # of a file that are decoded before the clock is looked at again
_EIGHT_BITS = (np.arange(2**16) / 257).round().astype(np.uint8)


class TooSlow(BadPicture):
    """A picture whose decoding was given up when its time was over."""


class _Timed(io.BytesIO):
    """A file that cannot be read from after `deadline` (of time.monotonic): it stops a decoder between two pieces."""

    deadline = float("inf")

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes. Raises TooSlow."""
        if time.monotonic() > self.deadline:
            raise TooSlow("decoding it takes too long")
        return super().read(size)


def opened(data: bytes, max_pixels: int = MAX_PIXELS, deadline: float = float("inf")) -> Image.Image:
    """The picture as upright 8-bit RGB.

    CMYK, palettes, grey and 16-bit grey are converted, transparency is laid on black, EXIF orientation is applied. Of
    a camera's multi-picture JPEG the first one is taken. Decoding is given up at `deadline` (of time.monotonic; a WebP
    is decoded in one go); datasets are imported without one, so that no timing decides what is in them.
    Raises BadPicture: empty, too large, not one of `FORMATS`, animated, damaged, too slow.
    """
    image = checked(data, max_pixels, deadline)
    try:
        image.load()
        return _plain(_upright(image))
    except BadPicture:
        raise
    except Exception as error:  # broken data can raise almost anything from a decoder
        raise BadPicture(f"damaged: {one_line(error)}") from None


def checked(data: bytes, max_pixels: int = MAX_PIXELS, deadline: float = float("inf")) -> Image.Image:
    """The picture, opened up to its header and not yet decoded. Raises BadPicture."""
    if not data:
        raise BadPicture("the file is empty")
    if len(data) > MAX_BYTES:
        raise TooLarge(f"the file has {len(data):,} bytes, more than {MAX_BYTES:,}")
    _bound(_webp_size(data), max_pixels)  # its decoder reserves the canvas when it opens a file
    bombs.check(data, max_pixels)
    file = io.BytesIO(data) if deadline == float("inf") else _Timed(data)
    if isinstance(file, _Timed):
        file.deadline = deadline
    try:
        image = Image.open(file, formats=FORMATS)
        frames = getattr(image, "n_frames", 1)
    except Image.DecompressionBombError:
        raise TooLarge(f"more than {max_pixels:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadPicture(f"not a {', '.join(FORMATS)} picture, whatever its name says{_guess(data)}") from None
    except BadPicture:
        raise
    except Exception as error:  # a hostile header can raise almost anything
        raise BadPicture(f"damaged: {one_line(error)}") from None
    _bound(image.size, max_pixels)
    if frames > 1 and image.format != "MPO":  # phones add depth or gain maps to a JPEG: a still one all the same
        raise BadPicture("an animated picture; only still ones are read")
    image.decodermaxblock = _PIECE_BYTES
    return image


def _bound(size: tuple[int, int] | None, max_pixels: int) -> None:
    if size is not None and size[0] * size[1] > max_pixels:
        raise TooLarge(f"{size[0]}x{size[1]} pixels, more than {max_pixels:,} in all")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas of a WebP file from its header; None for anything else."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    data = data[:30].ljust(30, b"\0")
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def encoded(image: Image.Image) -> bytes:
    """The picture as JPEG, without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=QUALITY, comment=b"")  # else the source's comment travels on
    return buffer.getvalue()


def perceptual_hash(image: Image.Image) -> bytes:
    """256 bits by which a picture is known again, 32 bytes: they hardly change with size, compression or brightness.

    The 16 x 16 lowest frequencies of its 64 x 64 grey version, each against their median (Zauner 2010, "Implementation
    and benchmarking of perceptual image hash functions"). Tombstones hold it: another value of it would let what was
    forgotten in again.
    """
    return perceptual_hashes(image)[:32]


def perceptual_hashes(image: Image.Image) -> bytes:
    """The perceptual hash of a picture, then that of its mirror image: 64 bytes."""
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR).tobytes()
    grey = np.frombuffer(small, np.uint8).reshape(_SIDE, _SIDE).astype(np.float32)
    low = _cosines() @ grey @ _cosines().T
    signs = np.where(np.arange(_LOW) % 2, -1, 1).astype(np.float32)  # mirroring turns those of odd frequencies across
    return _above_median(low) + _above_median(low * signs)


def _above_median(low: NDArray[np.floating]) -> bytes:
    ranked = np.partition(low.ravel(), (127, 128))
    return np.packbits(low.ravel() > (ranked[127] + ranked[128]) / 2).tobytes()


@cache
def _cosines() -> NDArray[np.float32]:
    k, n = np.arange(_LOW)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE)).astype(np.float32)


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return image  # the usual case, without building an empty EXIF table
    if _EXIF_ORIENTATION not in image.getexif():
        return image
    return ImageOps.exif_transpose(image)


def _plain(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode.startswith("I;16"):  # a table, since 16 megapixels of floating point would take a gigabyte
            return Image.fromarray(_EIGHT_BITS[values]).convert("RGB")
        values = values.astype(np.float64)
        if values.max(initial=0) > 255:  # 16 bits a pixel
            values = values / 257
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _guess(data: bytes) -> str:
    known = {b"PK\x03\x04": "a ZIP archive", b"%PDF": "a PDF", b"\x1f\x8b": "a gzip file"}
    known |= {b"<": "a text or web page", b"\x89HDF": "an HDF5 file"}
    known |= {b"\xff\xd8\xff": "a JPEG cut short", b"\x89PNG": "a PNG cut short"}
    pictures = {b"GIF8": "a GIF", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"8BPS": "a Photoshop picture"}
    pictures |= {b"\xff\x0a": "a JPEG XL", b"\0\0\0\x0cJXL ": "a JPEG XL", b"\0\0\0\x0cjP  ": "a JPEG 2000"}
    if data[4:8] == b"ftyp":  # ISO base media: its kind, and those that it can also be read as, in words of four
        size = min(int.from_bytes(data[:4]), 256)
        kinds = {data[at : at + 4] for at in (8, *range(16, size, 4))}
        still = "an AVIF" if kinds & {b"avif", b"avis"} else "a HEIC" if kinds & _HEIF else ""
        (pictures if still else known)[data[:8]] = still or "a video"
    found = next((name for start, name in (pictures | known).items() if data.startswith(start)), "")
    mend = "; convert it to JPEG, as with: magick FILE out.jpg" if found in pictures.values() else ""
    return f" (it looks like {found}{mend})" if found else ""
