"""Pictures that evaluation does not cover: too small, too blurred, too dark, almost of one color, or grey.

Evaluation asks its questions again of pictures made worse (`evaluate.predict.KINDS`): among them blurred by 2 % of
the shorter side, and at 30 % of their brightness. What is worse than those was never measured, so nothing is known of
the answers. The limits (`serve.quality`) are figures of 150 drawn heads made worse in this way: 99 in 100 of the
blurred are as sharp, 99 in 100 of the dark as bright and as rich in contrast, and 99 in 100 pictures of the least side
are, enlarged, as sharp as that. `benchmarks/picture_limits.py` measures them anew; a deployment for real photographs
should, on its own.

Whether there is a face at all, or several, or one upside down, no figure here tells: a detector does (`face_detector`,
where `serve.quality.detector` names its weights), or the request's box. Without either nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Faces:
    """What a detector finds in a picture: how many faces, and whether the surest stands on its head."""

    count: int
    upside_down: bool = False


FindFaces = Callable[[Image.Image], Faces]

UPSIDE_DOWN = 0.6
"""By how much (logit) the detector has to be surer of a face in the picture turned by 180 degrees: of 120 drawn heads
turned so it is in 99 of 100, of upright ones, blurred or noisy, in 1 to 5 of 100."""

FINE, COARSE = 48, 16
"""Pixels of the shorter side at which detail is looked for. A picture is reduced or enlarged to them, so that a blur of
the same share of the side gives the same figure whatever the picture's size."""
_LONG = 4
"""A longer side is looked at as if it were at most so many times the shorter."""
_DARK, _BRIGHT = 3, 252
"""Values up to the one and from the other on say nothing of what was there."""


@dataclass(frozen=True)
class Coverage:
    """What evaluation covers: pixels of the shorter side, figures of `measure`. None: no limit."""

    min_side: int | None
    min_sharpness: float | None
    min_brightness: float | None
    min_contrast: float | None
    min_color: float | None


def face_detector(folder: Path) -> FindFaces:
    """MediaPipe's face detector, from weights in a folder (`python -m facemllm.annotate.experts FOLDER`). For faces
    that fill a good part of the picture; safe in several threads. Raises UserError without LiteRT or the weights."""
    from threading import local

    from facemllm.core.mediapipe import DETECTOR, WEIGHTS, Network, found_faces, verified

    path, own = folder / DETECTOR, local()
    verified(path, WEIGHTS[DETECTOR][2], "serve.quality.detector")
    Network(path)

    def find(image: Image.Image) -> Faces:
        if not hasattr(own, "network"):
            own.network = Network(path)
        picture = image.convert("RGB")
        upright = found_faces(picture, own.network)
        turned = found_faces(picture.transpose(Image.Transpose.ROTATE_180), own.network)
        surest = upright[0][-1] if upright else 0.0
        over = bool(turned) and turned[0][-1] - surest > UPSIDE_DOWN
        return Faces(max(len(upright), int(over)), over)

    return find


def measure(image: Image.Image, find_faces: FindFaces | None = None) -> dict[str, float]:
    """Facts about a picture, or about the part of it that shows the face: `width` and `height` in pixels; `sharpness`,
    the variance of the Laplacian at `FINE` pixels over that at `COARSE`: how much detail is left of what the coarse
    picture shows, in the dark as in the light, of a smooth face as of a rough one; `brightness` (mean) and
    `contrast` (standard deviation) of grey values from 0 to 1; `color`, how far red, green and blue differ, as a share
    of the brightest; `saturated`, the share of pixels that are as good as black or white; and `faces` and `upside_down`
    if there is a detector."""
    whole = image.convert("RGB").convert("L")
    grey = _grey(whole, FINE)
    fine, coarse = _detail(grey), _detail(_grey(whole, COARSE))
    width, height = image.size
    facts = {
        "width": float(width),
        "height": float(height),
        "sharpness": fine / coarse if coarse > _FLAT else 0.0,
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "color": _color(image),
        "saturated": float(np.mean((grey <= _DARK / 255) | (grey >= _BRIGHT / 255))),
    }
    if find_faces is None:
        return facts
    found = find_faces(image)
    return {**facts, "faces": float(found.count), "upside_down": float(found.upside_down)}


_FLAT = 1e-7
"""Detail of a picture of one color, but for rounding."""


def _grey(image: Image.Image, side: int) -> NDArray[np.float32]:
    """Grey values from 0 to 1, the shorter side reduced or enlarged to `side` pixels."""
    shorter = min(image.size)
    size = [min(round(side * one / shorter), _LONG * side) for one in image.size]
    small = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32) / np.float32(255)


def _color(image: Image.Image) -> float:
    """Mean difference of the largest and the least of red, green and blue, over the mean of the largest."""
    small = np.asarray(image.convert("RGB").resize((COARSE, COARSE), Image.Resampling.BOX), dtype=np.float32)
    brightest = float(small.max(axis=-1).mean())
    return float((small.max(axis=-1) - small.min(axis=-1)).mean()) / brightest if brightest else 0.0


def _detail(grey: NDArray[np.float32]) -> float:
    """Variance of the Laplacian."""
    middle = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle).var())


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
    if facts.get("upside_down"):
        return "the face is upside down; send the picture turned"
    for name, least, why in (
        ("brightness", coverage.min_brightness, "too dark"),
        ("contrast", coverage.min_contrast, "almost of one color"),
        ("color", coverage.min_color, "grey"),
        ("sharpness", coverage.min_sharpness, "too blurred"),
    ):
        if least is not None and facts[name] < least:
            return f"the picture is {why}: {name} {facts[name]:.2g}, evaluation covers {least:g} and more"
    return None
