"""What a row's segmentation shows: pixels of each part of the face, from the PNG of the 19 CelebAMask-HQ classes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from functools import lru_cache

from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tasks.base import Row

CLASSES = (
    *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip"),
    *("l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
"""Classes by their number in the map (github switchablenorms/CelebAMask-HQ)."""

SHOWN_BY: Mapping[str, tuple[str, ...]] = {
    "Eyeglasses": ("eye_g",),
    "Sunglasses": ("eye_g",),
    "No_Eyewear": ("eye_g",),
    "Wearing_Hat": ("hat",),
    "Wearing_Earrings": ("ear_r",),
    "Wearing_Necklace": ("neck_l",),
    "Wearing_Necktie": ("neck_l",),
    **dict.fromkeys(("Mouth_Closed", "Mouth_Slightly_Open", "Mouth_Wide_Open"), ("mouth",)),
}
"""Attributes that the very presence of a class in the map gives away, and the classes."""

SHOWN_WITHOUT: Mapping[str, str] = {"Bald": "hair"}
"""Attributes that the absence of a class gives away which cannot be withheld: too much of the map would go with it."""


def withheld_classes(held_out: Iterable[str]) -> list[int]:
    """Numbers of the classes that a model may not see in maps, if it is not to learn these attributes from them.

    Raises UserError for an attribute that no map can keep to itself.
    """
    held_out = list(held_out)
    for name in held_out:
        if name in SHOWN_WITHOUT:
            raise UserError(
                f"reformat.held_out: {name} shows in a map of face parts, which has no {SHOWN_WITHOUT[name]} then; "
                "hold out another attribute or set model.segmentation.mode: none"
            )
    return sorted({CLASSES.index(part) for name in held_out for part in SHOWN_BY.get(name, ())})


def withheld_of(settings: Settings) -> list[int]:
    """Classes that the model of these settings never sees in a map, see `withheld_classes`."""
    return withheld_classes(settings.reformat.held_out) if settings.model.segmentation.mode != "none" else []


MAX_PIXELS = 2048 * 2048
FAINT = 2000
"""A part of less than one in so many of the map's pixels is neither plainly there nor plainly absent."""

Sizes = Mapping[str, float]
"""Class name -> its share of the map's pixels."""


def sizes(row: Row) -> Sizes | None:
    """Shares of the classes in a row's segmentation; None where there is none or it is no such map."""
    stored = row.get("segmentation")
    data = stored.get("bytes") if isinstance(stored, Mapping) else stored
    return _sizes(data) if data else None


@lru_cache(maxsize=4)  # all questions about a face are asked in a row
def _sizes(data: bytes) -> Sizes | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS or image.mode not in ("L", "P"):
                return None
            counts = image.histogram()
            total = image.width * image.height
    except Exception:  # damaged data can raise almost anything from a decoder
        return None
    if any(counts[len(CLASSES) :]):
        return None
    return {name: count / total for name, count in zip(CLASSES, counts, strict=False)}


def seen(found: Sizes, classes: tuple[str, ...]) -> bool | None:
    """Whether any of these classes is to be seen: no pixel is no; a few pixels are neither yes nor no."""
    share = sum(found[name] for name in classes)
    return True if share >= 1 / FAINT else None if share else False


def hidden_from(row: Row, *classes: str) -> bool:
    """Whether a row's segmentation says that none of these classes can be seen."""
    found = sizes(row)
    return found is not None and seen(found, classes) is False
