"""What the readers of head pose share: the range of angles, and the .mat files of 300W-LP and AFLW2000-3D.

Signs are those of 300W-LP's `Pose_Para`, in degrees: yaw > 0 points the nose to the image's left, pitch > 0 up,
roll > 0 leans the head clockwise in the image.

Crop: the loose frame of the published evaluations on AFLW2000-3D (HopeNet, 6DRepNet), k = 0.20: the box around the 68
landmarks, then left and top moved out by 2k = 0.4 of its width and height. Their code moves the right and the bottom
side by 2k and 0.6k of the box as it is by then, 1.4 times as large, so these sides move by 0.56 and 0.168 of the first
box; that is kept, since a figure compares only with pictures that are framed alike. Beyond the picture, where their
code pads with black, the crop ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.ingest.reader import Box, Refuse, Refused
from facemllm.ingest.readers.files import files, small
from facemllm.ingest.readers.matfile import arrays

LIMIT = 99.0
"""Degrees: the published protocol leaves out samples with an angle beyond (bins of 3 degrees from -99)."""

_K = 0.20
_GROWN = 1 + 2 * _K


def degrees(yaw: float, pitch: float, roll: float) -> dict[str, float]:
    """The three angles as labels. Raises Refuse when one is not finite or beyond `LIMIT`."""
    found = {"yaw": yaw, "pitch": pitch, "roll": roll}
    for name, value in found.items():
        if not math.isfinite(value):
            raise Refuse(f"{name} is not a finite number")
        if abs(value) > LIMIT:
            raise Refuse(f"{name} is {value:.1f} degrees, beyond {LIMIT:g}")
    return found


def framed(points: NDArray[np.float64]) -> Box:
    """The published loose frame around points (n, 2)."""
    left, top = (float(v) for v in points.min(axis=0))
    right, bottom = (float(v) for v in points.max(axis=0))
    width, height = right - left, bottom - top
    return (
        left - 2 * _K * width,
        top - 2 * _K * height,
        right + 2 * _K * _GROWN * width,
        bottom + 0.6 * _K * _GROWN * height,
    )


def annotated(folder: Path, root: Path) -> Iterator[tuple[str, Path, Path] | Refused]:
    """(stem, picture, .mat) of every .mat in a folder, in name order; a picture without one is refused. The picture
    may be missing. Raises UserError when the folder cannot be listed."""
    names = files(folder)
    pictures = {Path(name).stem: name for name in names if name.lower().endswith(".jpg")}
    mats = {Path(name).stem: name for name in names if name.lower().endswith(".mat")}
    for stem in sorted(pictures | mats):
        if stem in mats:
            yield stem, folder / pictures.get(stem, f"{stem}.jpg"), folder / mats[stem]
        else:
            yield Refused((folder / pictures[stem]).relative_to(root).as_posix(), 0, f"no label row ({stem}.mat)")


def from_mat(path: Path, root: Path) -> dict[str, Any]:
    """yaw, pitch, roll (degrees), landmarks (68 in pixels, where there are so many) and crop of one .mat file.

    Raises Refuse when it is missing, too large, damaged, without pose or landmarks, or with an angle out of range.
    """
    found = arrays(small(path, root), ("Pose_Para", "pt2d", "pt3d_68"))
    pose = found.get("Pose_Para", np.empty(0)).reshape(-1)
    if pose.size < 3:
        raise Refuse(f"{path.name} has no Pose_Para with pitch, yaw and roll")
    pitch, yaw, roll = np.degrees(pose[:3]).tolist()
    labels: dict[str, Any] = dict(degrees(yaw, pitch, roll))
    points = _points(found)
    if not len(points) or not np.isfinite(points).all():
        raise Refuse(f"{path.name} has no finite landmarks (pt2d or pt3d_68)")
    if len(points) == 68:
        labels["landmarks"] = points.tolist()
    return labels | {"crop": framed(points)}


def _points(found: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    flat, solid = found.get("pt2d", np.empty((2, 0))), found.get("pt3d_68", np.empty((3, 0)))
    if flat.shape == (2, 68):
        return flat.T
    if solid.shape == (3, 68):
        return solid[:2].T
    if flat.shape[0] != 2:
        return np.empty((0, 2))
    return flat.T[(flat != -1).all(axis=0)]  # -1 marks a point that is not visible
