"""How training changes a picture: mirrored, shifted, relit; some dimmed, blurred or covered in part.

What happens to each picture of a step is drawn with the step's plan (numpy) and done where the model is (torch).
Shapes: B pictures, S their side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from facemllm.tables.schemas import SEGMENTATION

SHIFT = 1 / 16  # of the side: 6 pixels at 96
LIGHT = 0.15
GAIN = 0.04
DIMMEST = 0.15
BLURRED = 0.025  # of the side, the largest standard deviation: 2.4 pixels at 96
COVERED = (0.15, 0.4)  # of the picture's area
LONGEST = 0.8  # of the side


@dataclass(frozen=True)
class Changes:
    """What happens to each image of a batch. The last three are None where nothing is disturbed."""

    mirror: NDArray[np.bool_]  # (B,)
    shift: NDArray[np.int64]  # (B, 2) rows and columns, pixels
    contrast: NDArray[np.float32]  # (B, 1, 1, 1) factor
    offset: NDArray[np.float32]  # (B, 1, 1, 3) in half-ranges: brightness and colour gain
    dim: NDArray[np.float32] | None = None  # (B, 1, 1, 1) factor of every value
    blur: NDArray[np.float32] | None = None  # (B,) standard deviation in pixels; 0 leaves it sharp
    cover: NDArray[np.int64] | None = None  # (B, 5) top, bottom, left, right in pixels, and the grey that covers

    def part(self, rows: slice | NDArray[np.int64]) -> Changes:
        """The changes of some images of the batch."""
        return Changes(
            self.mirror[rows],
            self.shift[rows],
            self.contrast[rows],
            self.offset[rows],
            dim=None if self.dim is None else self.dim[rows],
            blur=None if self.blur is None else self.blur[rows],
            cover=None if self.cover is None else self.cover[rows],
        )


def draw_changes(generator: np.random.Generator, images: int, side: int, disturb: float = 0.0) -> Changes:
    """Draw changes for `images` images of `side` pixels; each is dimmed, blurred and covered with the chance `disturb`
    of each."""
    reach = max(1, round(side * SHIFT))

    def spread(size: float, *shape: int) -> NDArray[np.float32]:
        return generator.uniform(-size, size, (images, *shape)).astype(np.float32)

    drawn = Changes(
        mirror=generator.random(images) < 0.5,
        shift=generator.integers(-reach, reach + 1, (images, 2)),
        contrast=1 + spread(LIGHT, 1, 1, 1),
        offset=spread(LIGHT, 1, 1, 1) + spread(GAIN, 1, 1, 3),
    )
    if not disturb:
        return drawn
    dimmed, blurred, covered = generator.random((3, images)) < disturb
    dim = np.where(dimmed, np.exp(generator.uniform(np.log(DIMMEST), 0, images)), 1.0)
    blur = np.where(blurred, generator.uniform(0.2, 1, images) * BLURRED * side, 0.0)
    area, shape = generator.uniform(*COVERED, images), generator.uniform(-1, 1, images)
    # from a band across the picture over a square to a band down it
    height = np.clip(np.sqrt(area) * (area / LONGEST**2) ** (shape / 2), 0, 1)
    width = np.clip(area / height, 0, 1)
    top, left = generator.random(images) * (1 - height), generator.random(images) * (1 - width)
    box = np.stack([top, top + height, left, left + width], 1) * covered[:, None]
    grey = generator.integers(0, 256, images)
    return Changes(
        drawn.mirror,
        drawn.shift,
        drawn.contrast,
        drawn.offset,
        dim=dim.astype(np.float32)[:, None, None, None],
        blur=blur.astype(np.float32),
        cover=np.concatenate([np.rint(box * side).astype(np.int64), grey[:, None]], 1),
    )


def apply_changes(pixels_BSSC: Tensor, changes: Changes) -> Tensor:
    """Changed pixels (B, S, S, 3), float32, on the scale 0..255; shifted-in pixels repeat the border."""
    contrast = torch.from_numpy(changes.contrast).to(pixels_BSSC.device)
    offset = torch.from_numpy(changes.offset * 127.5 + 127.5 * (1 - changes.contrast)).to(pixels_BSSC.device)
    changed_BSSC = _moved(pixels_BSSC, changes).float().mul_(contrast).add_(offset)
    if changes.cover is not None:
        changed_BSSC = torch.where(
            _covers(changes.cover, changed_BSSC), _greys(changes.cover, changed_BSSC), changed_BSSC
        )
    if changes.blur is not None and (blurred := np.flatnonzero(changes.blur)).size:
        rows = torch.from_numpy(blurred).to(pixels_BSSC.device)
        with torch.autocast(rows.device.type, enabled=False):  # a pixel has eight bits, as bfloat16 has
            changed_BSSC[rows] = _blurred(changed_BSSC[rows], changes.blur[blurred])
    if changes.dim is not None:
        changed_BSSC *= torch.from_numpy(changes.dim).to(pixels_BSSC.device)
    return changed_BSSC


def apply_to_maps(maps_BSS: Tensor, changes: Changes) -> Tensor:
    """Maps of face parts, moved as the pictures are; in a mirrored one left and right parts change names."""
    moved_BSS = _moved(maps_BSS, changes)
    swapped_BSS = _SWAPPED.to(maps_BSS.device)[moved_BSS.long()]
    mirrored_B11 = torch.from_numpy(changes.mirror).to(maps_BSS.device)[:, None, None]
    return torch.where(mirrored_B11, swapped_BSS, moved_BSS)


def _moved(images: Tensor, changes: Changes) -> Tensor:
    """Images (B, S, S, ...) shifted and mirrored."""
    count, side = images.shape[:2]
    place_S = np.arange(side)
    rows_BS = np.clip(place_S + changes.shift[:, :1], 0, side - 1)
    columns_BS = np.clip(np.where(changes.mirror[:, None], place_S[::-1], place_S) + changes.shift[:, 1:], 0, side - 1)
    pixel_BSS = (np.arange(count)[:, None] * side + rows_BS)[:, :, None] * side + columns_BS[:, None, :]
    flat = torch.from_numpy(pixel_BSS.reshape(-1)).to(images.device)
    # four times as fast as indexing by rows and columns
    return torch.index_select(images.reshape(count * side * side, -1), 0, flat).view(images.shape)


def _covers(cover: NDArray[np.int64], images: Tensor) -> Tensor:
    """Where each image is covered: (B, S, S, 1)."""
    top, bottom, left, right = (torch.from_numpy(cover[:, at]).to(images.device)[:, None] for at in range(4))
    place_1S = torch.arange(images.shape[1], device=images.device)[None]
    down_BS, across_BS = (place_1S >= top) & (place_1S < bottom), (place_1S >= left) & (place_1S < right)
    return (down_BS[:, :, None] & across_BS[:, None, :])[..., None]


def _greys(cover: NDArray[np.int64], images: Tensor) -> Tensor:
    return torch.from_numpy(cover[:, 4]).to(images.device, images.dtype)[:, None, None, None]


def _blurred(images: Tensor, deviation: NDArray[np.float32]) -> Tensor:
    """Each image (B, S, S, 3) under a Gaussian of its own standard deviation in pixels; borders are repeated."""
    count, side = images.shape[:2]
    reach = max(1, int(np.ceil(2.5 * deviation.max())))
    offsets = np.arange(-reach, reach + 1)
    kernel_BK = np.exp(-0.5 * (offsets / np.maximum(deviation, 0.1)[:, None]) ** 2)
    kernel_BK /= kernel_BK.sum(1, keepdims=True)
    kernels = torch.from_numpy(kernel_BK.astype(np.float32)).to(images.device).repeat_interleave(3, 0)
    planes = F.pad(images.permute(0, 3, 1, 2).reshape(1, count * 3, side, side), [reach] * 4, mode="replicate")
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=count * 3)
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=count * 3)
    return planes.view(count, 3, side, side).permute(0, 2, 3, 1)


def _swapped() -> Tensor:
    """Class of every map value in a mirrored face; values that are no class stay."""
    table = torch.arange(256, dtype=torch.uint8)
    for number, name in enumerate(SEGMENTATION):
        if name.startswith(("l_", "r_")) and name != "l_lip":
            table[number] = SEGMENTATION.index(("r_" if name.startswith("l_") else "l_") + name[2:])
    return table


_SWAPPED = _swapped()
