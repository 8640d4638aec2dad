"""Label-preserving changes of a batch of faces: mirror, shift, brightness, contrast, colour gain.

What is drawn depends on (seed, stage, step) and the place in the global batch alone, never on the rank or on what was
drawn before: a resumed run and a run on more workers see the same pictures.
Shapes: B batch, S image side; pixels are (B, S, S, 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facemllm.tables.schemas import SEGMENTATION

SHIFT = 1 / 16  # of the side: 6 pixels at 96
LIGHT = 0.15
GAIN = 0.04


@dataclass(frozen=True)
class Changes:
    """What happens to each image of a batch."""

    mirror: NDArray[np.bool_]  # (B,)
    shift: NDArray[np.int64]  # (B, 2) rows and columns, pixels
    contrast: NDArray[np.float32]  # (B, 1, 1, 1) factor
    offset: NDArray[np.float32]  # (B, 1, 1, 3) in half-ranges: brightness and colour gain

    def part(self, rows: slice | NDArray[np.int64]) -> Changes:
        """The changes of some images of the batch."""
        return Changes(self.mirror[rows], self.shift[rows], self.contrast[rows], self.offset[rows])


def draw(generator: np.random.Generator, images: int, side: int) -> Changes:
    """Draw changes for `images` images of `side` pixels."""
    reach = max(1, round(side * SHIFT))

    def spread(size: float, *shape: int) -> NDArray[np.float32]:
        return generator.uniform(-size, size, (images, *shape)).astype(np.float32)

    return Changes(
        mirror=generator.random(images) < 0.5,
        shift=generator.integers(-reach, reach + 1, (images, 2)),
        contrast=1 + spread(LIGHT, 1, 1, 1),
        offset=spread(LIGHT, 1, 1, 1) + spread(GAIN, 1, 1, 3),
    )


def apply(pixels_BSSC: Tensor, changes: Changes) -> Tensor:
    """Changed pixels (B, S, S, 3), float32, on the scale 0..255; shifted-in pixels repeat the border."""
    contrast = torch.from_numpy(changes.contrast).to(pixels_BSSC.device)
    offset = torch.from_numpy(changes.offset).to(pixels_BSSC.device) * 127.5
    return (_moved(pixels_BSSC, changes).float() - 127.5) * contrast + offset + 127.5


def apply_to_maps(maps_BSS: Tensor, changes: Changes) -> Tensor:
    """Maps of face parts, moved as the pictures are; in a mirrored one left and right parts change names."""
    moved_BSS = _moved(maps_BSS, changes)
    swapped_BSS = _SWAPPED.to(maps_BSS.device)[moved_BSS.long()]
    mirrored_B11 = torch.from_numpy(changes.mirror).to(maps_BSS.device)[:, None, None]
    return torch.where(mirrored_B11, swapped_BSS, moved_BSS)


def _moved(images: Tensor, changes: Changes) -> Tensor:
    count, side = images.shape[:2]
    device = images.device
    place_S = np.arange(side)
    rows_BS = np.clip(place_S + changes.shift[:, :1], 0, side - 1)
    columns_BS = np.clip(np.where(changes.mirror[:, None], place_S[::-1], place_S) + changes.shift[:, 1:], 0, side - 1)
    return images[
        torch.arange(count, device=device)[:, None, None],
        torch.from_numpy(rows_BS).to(device)[:, :, None],
        torch.from_numpy(columns_BS).to(device)[:, None, :],
    ]


def _swapped() -> Tensor:
    """Class of every map value in a mirrored face; values that are no class stay."""
    table = torch.arange(256, dtype=torch.uint8)
    for number, name in enumerate(SEGMENTATION):
        if name.startswith(("l_", "r_")) and name != "l_lip":
            table[number] = SEGMENTATION.index(("r_" if name.startswith("l_") else "l_") + name[2:])
    return table


_SWAPPED = _swapped()
