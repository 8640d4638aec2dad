"""Pictures that evaluation does not cover: too small, too blurred, too dark, almost of one color.

Evaluation asks its questions again of pictures made worse (`evaluate.predict.KINDS`): among them blurred by 2 % of
the shorter side, and at 30 % of their brightness. What is worse than those was never measured, so nothing is known of
the answers. The limits (`serve.quality`) are figures of 150 drawn heads made worse in this way: 99 in 100 of the
blurred are as sharp, 99 in 100 of the dark as bright and as rich in contrast, and 99 in 100 pictures of the least side
are, enlarged, as sharp as that. `benchmarks/picture_limits.py` measures them anew; a deployment for real photographs
should, on its own.

Whether there is a face at all, or several, no figure here tells: a `count_faces` that the deployment brings says so, or
the request's box does. Without either nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

CountFaces = Callable[[Image.Image], int]
"""How many faces a detector finds in a picture."""

SIDE = 96
"""Pixels of the shorter side at which sharpness is measured; larger pictures are reduced to it, smaller ones enlarged,
so that a blur of the same share of the side gives the same figure."""
_DARK, _BRIGHT = 3, 252
"""Values up to the one and from the other on say nothing of what was there."""


@dataclass(frozen=True)
class Coverage:
    """What evaluation covers: pixels of the shorter side, figures of `measure`. None: no limit."""

    min_side: int | None
    min_sharpness: float | None
    min_brightness: float | None
    min_contrast: float | None


def measure(image: Image.Image, count_faces: CountFaces | None = None) -> dict[str, float]:
    """Facts about a picture, or about the part of it that shows the face: `width` and `height` in pixels; `sharpness`,
    the variance of the Laplacian at `SIDE` pixels over the variance of the values, so that a dark picture is not taken
    for a blurred one; `brightness` (mean) and `contrast` (standard deviation) of grey values from 0 to 1; `saturated`, the
    share of pixels that are as good as black or white; and `faces` if there is somebody to count them."""
    width, height = image.size
    scale = SIDE / min(width, height)
    small = image.convert("L").resize(
        (max(SIDE, round(scale * width)), max(SIDE, round(scale * height))), Image.Resampling.BILINEAR
    )
    grey = np.asarray(small, dtype=np.float32) / 255
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    spread = float(grey.var())
    saturated = np.mean((grey <= _DARK / 255) | (grey >= _BRIGHT / 255))
    facts = {
        "width": float(width),
        "height": float(height),
        "sharpness": float(laplacian.var()) / spread if spread > _FLAT else 0.0,
        "brightness": float(grey.mean()),
        "contrast": spread**0.5,
        "saturated": float(saturated),
    }
    return facts if count_faces is None else {**facts, "faces": float(count_faces(image))}


_FLAT = 1e-6
"""Variance of a picture of one colour, but for rounding."""


def refuses(facts: Mapping[str, float], coverage: Coverage) -> str | None:
    """Why a picture is not one that evaluation covers, in one line that says what would help; None if it is."""
    side = min(facts["width"], facts["height"])
    if coverage.min_side is not None and side < coverage.min_side:
        return f"the picture is too small: {side:.0f} pixels on its shorter side, {coverage.min_side} are needed"
    faces = facts.get("faces")
    if faces == 0:
        return "no face was found; send a picture that shows one, or a box around it"
    if faces is not None and faces > 1:
        return f"{faces:.0f} faces were found; send a box around the one that is meant"
    for name, least, why in (
        ("brightness", coverage.min_brightness, "too dark"),
        ("contrast", coverage.min_contrast, "almost of one color"),
        ("sharpness", coverage.min_sharpness, "too blurred"),
    ):
        if least is not None and facts[name] < least:
            return f"the picture is {why}: {name} {facts[name]:.2g}, evaluation covers {least:g} and more"
    return None
