"""Images and maps of face parts as every part of the project sees them: one decoder, one resize, one normalisation.

Training, evaluation and serving prepare an image here, with the model's own image processor, so that they answer alike.
A map (the 19 classes of CelebAMask-HQ) is cut and resized as its image is. A class may be withheld: its pixels take the
class of the nearest other pixel, so that a map does not show what the questions leave out (`reformat.held_out`).
Shapes: B batch, S image side in pixels; uint8 pixels are (B, S, S, 3), normalised ones (B, 3, S, S), a map (S, S)
uint8, `NO_MAP` everywhere if there is none.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from facemllm.errors import UserError
from facemllm.model.branches import CLASSES, NO_MAP

MAX_PIXELS = 4096 * 4096

ImageLike = Image.Image | bytes | NDArray[np.uint8]
MapLike = Image.Image | bytes | NDArray[np.uint8]


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


def face_map(source: MapLike | None, image_processor: Any, withheld: Collection[int] = ()) -> NDArray[np.uint8]:
    """A map, PNG bytes or class numbers, at the model's size (S, S); None gives `NO_MAP` everywhere.

    Raises UserError for anything that is no greyscale map of the 19 classes.
    """
    if source is None:
        size = image_processor.crop_size or image_processor.size
        return np.full((size["height"], size["width"]), NO_MAP, np.uint8)
    classes_HW = _classes(source)
    if withheld:
        classes_HW = without(classes_HW, withheld)
    grey = Image.fromarray(classes_HW, "L").convert("RGB")
    return face_pixels(grey, image_processor, nearest=True)[..., 0].copy()


def without(classes_HW: NDArray[np.uint8], withheld: Collection[int]) -> NDArray[np.uint8]:
    """The map with every pixel of the withheld classes as its nearest other pixel; background if there is no other."""
    from scipy.ndimage import distance_transform_edt

    hidden_HW = np.isin(classes_HW, list(withheld))
    if not hidden_HW.any():
        return classes_HW
    if hidden_HW.all():
        return np.zeros_like(classes_HW)
    nearest = distance_transform_edt(hidden_HW, return_distances=False, return_indices=True)
    return np.asarray(classes_HW[tuple(nearest)])


def _classes(source: MapLike) -> NDArray[np.uint8]:
    if isinstance(source, bytes):
        try:
            with Image.open(io.BytesIO(source), formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"the segmentation map has {image.width} x {image.height} pixels; too many")
                image.load()
                source = image
        except UserError:
            raise
        except Exception as error:  # damaged data can raise almost anything from a decoder
            raise UserError(f"the segmentation map is no readable PNG: {error}") from error
    if isinstance(source, Image.Image):
        if source.mode not in ("L", "P"):
            raise UserError(f"the segmentation map is a {source.mode} image; it has to hold class numbers (L or P)")
        source = np.asarray(source)
    if source.ndim != 2 or source.dtype != np.uint8 or source.max(initial=0) >= CLASSES:
        raise UserError(f"the segmentation map has to hold class numbers below {CLASSES}, one a pixel")
    return source
