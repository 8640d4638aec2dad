"""Pixels as every part of the project sees them: one decoder, one resize, one normalisation.

Training, evaluation and serving prepare an image here, with the model's own image processor, so that they answer alike.
Shapes: B batch, S image side in pixels; uint8 pixels are (B, S, S, 3), normalised ones (B, 3, S, S).
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

ImageLike = Image.Image | bytes | NDArray[np.uint8]


def face_pixels(image: ImageLike, image_processor: Any, *, nearest: bool = False) -> NDArray[np.uint8]:
    """Decode and resize one image: (S, S, 3) uint8 RGB, neither rescaled nor normalised.

    Resized with anti-aliasing, or, where values must not mix (`nearest`), by taking the nearest pixel.
    """
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    elif isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    options = {"resample": Image.Resampling.NEAREST} if nearest else {}
    batch = image_processor(image.convert("RGB"), do_rescale=False, do_normalize=False, return_tensors="np", **options)
    pixels_CSS = np.asarray(batch["pixel_values"])[0]
    return np.ascontiguousarray(pixels_CSS.transpose(1, 2, 0).astype(np.uint8))


def normalise(pixels_BSSC: Tensor, image_processor: Any) -> Tensor:
    """Pixels on the scale 0..255, any dtype, to what the tower takes: (B, 3, S, S) float in channels-last memory."""
    mean_C = torch.tensor(image_processor.image_mean, device=pixels_BSSC.device)
    std_C = torch.tensor(image_processor.image_std, device=pixels_BSSC.device)
    scaled_BSSC = (pixels_BSSC.float() * image_processor.rescale_factor - mean_C) / std_C
    return scaled_BSSC.permute(0, 3, 1, 2)
