"""A picture as the model sees it, without the checks and copies that transformers' processor makes around two calls of
Pillow: a quarter of its time, the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facemllm.model.inputs import ImageLike
from facemllm.model.reader import Reader

_SHAPES = ((1.0, 1.0), (2.7, 2.7), (1.37, 2.9), (2.3, 1.1), (0.61, 0.83))  # of probes, in sides of the model's picture


def pixels_of(reader: Reader) -> Callable[[ImageLike], NDArray[np.uint8]]:
    """`reader.pixels`, or, where the processor resizes the shorter side and cuts the middle out, a shorter way to the
    same bytes, which probes make sure of."""
    processor = reader.processor.image_processor
    side, cut = dict(processor.size or {}).get("shortest_edge"), dict(processor.crop_size or {})
    if not side or cut != {"height": side, "width": side}:
        return reader.pixels
    resample = Image.Resampling(int(processor.resample))

    def pixels(image: ImageLike) -> NDArray[np.uint8]:
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            return reader.pixels(image)
        shorter = min(image.size)
        width, height = (side if one == shorter else int(side * one / shorter) for one in image.size)
        small = np.asarray(image.resize((width, height), resample))
        top, left = (height - side) // 2, (width - side) // 2
        return np.ascontiguousarray(small[top : top + side, left : left + side])

    noise = np.random.default_rng(0)
    for across, down in _SHAPES:
        size = round(side * down), round(side * across), 3
        probe = Image.fromarray(noise.integers(0, 256, size, np.uint8))
        if not np.array_equal(pixels(probe), reader.pixels(probe)):
            return reader.pixels
    return pixels
