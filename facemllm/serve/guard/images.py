"""Images and maps of a request, checked up to their header before they are decoded.

Images come as base64 only (nothing is ever fetched), their format is found from their content, and their pixels are
counted before one is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facemllm.core import digests, images
from facemllm.serve.language import Encoded, Limits, Refused
from facemllm.tables.schemas import SEGMENTATION

MIN_SIDE = 8
MAX_RATIO = 8
_PNG_BITS = 24  # where the header of a PNG has its bits a pixel


def read_image(text: Any, where: str, limits: Limits) -> Encoded:
    """Check a base64 image up to its header. Raises Refused."""
    if not isinstance(text, str) or not text:
        raise Refused(422, f"{where} must be the image as base64 text; images are not fetched from addresses")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"{where} is not valid base64 (no line breaks, no data: prefix)") from None
    return check_image(data, where, limits)


def check_image(data: bytes, where: str, limits: Limits) -> Encoded:
    """Check an image up to its header, and what decoding it would cost. Raises Refused."""
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
