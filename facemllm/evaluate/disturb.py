"""Pictures made worse on purpose, to see whether answers hold: out of focus, dark, badly compressed, partly covered.

Each is a function of the picture and its image_id alone, and scales with the picture. Strengths are such that a person
still answers most questions.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

from PIL import Image, ImageFilter

from facemllm.core.draws import draw

BLUR = 0.02  # standard deviation, of the shorter side
DARK = 0.3  # of the brightness
JPEG_QUALITY = 10
GREY = (128, 128, 128)


def blur(image: Image.Image, image_id: str) -> Image.Image:
    """Out of focus: a Gaussian whose standard deviation is 2 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))


def dark(image: Image.Image, image_id: str) -> Image.Image:
    """Every value at 30 %."""
    return image.point([round(DARK * value) for value in range(256)] * len(image.getbands()))


def jpeg(image: Image.Image, image_id: str) -> Image.Image:
    """Compressed at quality 10 and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


def occlusion(image: Image.Image, image_id: str) -> Image.Image:
    """One third in grey: the upper, middle or lower, the left, central or right, drawn by a hash of the image_id."""
    drawn = draw(6, "occlusion", image_id)
    width, height = image.size
    start, end = drawn % 3, drawn % 3 + 1
    box = (
        (0, start * height // 3, width, end * height // 3)
        if drawn < 3
        else (start * width // 3, 0, end * width // 3, height)
    )
    covered = image.copy()
    covered.paste(GREY, box)
    return covered


NO_MAP = "no_map"
"""The picture as it is, without the map of face parts that stood beside it."""


def unchanged(image: Image.Image, image_id: str) -> Image.Image:
    """The picture itself."""
    return image


KINDS: Mapping[str, Callable[[Image.Image, str], Image.Image]] = {
    "blur": blur,
    "dark": dark,
    "jpeg": jpeg,
    "occlusion": occlusion,
}
