"""What only the pixels of a face and of its segmentation tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from facemllm.core import digests, images
from facemllm.validate.suites import SEGMENTATION_CLASSES

if TYPE_CHECKING:
    from PIL.Image import Image


def look(image_id: str | None, encoded: bytes, size: tuple[int | None, int | None], *, known: bool) -> dict[str, Any]:
    """Derived columns of a face's picture. `known` pictures were decoded when an earlier table was checked: of these
    only the bytes are compared with their name. Runs in a thread: hashing and decoding let the others work."""
    found = {"digest_matches": digests.of_bytes(encoded) == image_id, "decodes": None, "size_matches": None}
    if known:
        return {**found, "looks": None}
    picture = _decoded(encoded)
    return {
        **found,
        "decodes": picture is not None,
        "size_matches": None if picture is None else picture.size == size,
        "looks": None if picture is None else images.perceptual_hash(picture),
    }


def look_at_mask(encoded: bytes | None, size: tuple[int | None, int | None], *, known: bool) -> dict[str, Any]:
    """Derived columns of a segmentation; nulls where there is none, or where an earlier table had the very same."""
    found: dict[str, Any] = {
        "segmentation_decodes": None,
        "segmentation_matches_size": None,
        "segmentation_classes_ok": None,
    }
    if encoded is None or known:
        return found
    drawn = _decoded(encoded)
    found["segmentation_decodes"] = drawn is not None
    if drawn is not None:
        highest = drawn.getextrema()[1]
        found["segmentation_matches_size"] = drawn.size == size
        found["segmentation_classes_ok"] = (
            drawn.mode in ("L", "P") and isinstance(highest, int | float) and highest < SEGMENTATION_CLASSES
        )
    return found


def _decoded(encoded: bytes) -> Image | None:
    """The picture as it is stored, neither turned nor converted; None if it may not or cannot be opened."""
    try:
        picture = images.checked(encoded)
        picture.load()
    except Exception:  # broken data can raise almost anything from a decoder
        return None
    return picture
