"""BIWI Kinect Head Pose: 24 sequences of 20 people, the head's rotation and place in every frame.

    hpdb/ (or faces_0/, or its content at the root)
      01/ ... 24/    frame_00003_rgb.png  frame_00003_pose.txt  rgb.cal  (and *_depth.bin, depth.cal: not read)

A pose file holds three rows of the rotation matrix, then the head's centre in millimetres, both in the depth camera's
frame (x to image right, y down, z away from the camera; the identity faces the camera). Hence, with the signs of
300W-LP: yaw = atan2(R02, |R12, R22|), pitch = atan2(R12, R22), roll = -atan2(R01, R00): what HopeNet computes from the
transposed matrix. A test holds it against the renderer's rotations.

Crop: `crop: head` takes the square of 320 mm at the head's distance around its centre, seen by the colour camera of
`rgb.cal` (camera matrix; distortion, unused: zeros; rotation and translation in mm from the depth camera's frame).
That the translation maps depth to colour is inferred from its sign (the colour lens sits 25 mm right of the depth
lens), not stated by a source at hand; reversed, the frame would sit 24 mm aside. `crop: none` leaves pictures as they
are, and needs no `rgb.cal`. Published figures use a face detector's box instead, which the dataset does not hold.
Subjects: four people were recorded twice (02 and 21, 03 and 15, 05 and 18, 07 and 22), as in the dataset's own list.
Splits: `protocol: test` is the published use (trained on 300W-LP, all of BIWI is test); `own` draws them by person.
Frames follow each other as a camera saw them; `every: n` takes each n-th of a sequence.
Refused: pictures without pose file, pose files that hold no rotation, angles beyond 99 degrees, folders that are none
of the 24 sequences.
Source: https://icu.ee.ethz.ch/research/datsets.html; Fanelli and others, IJCV 2013.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Box, Face, Reader, Refuse, Refused, files, folders, small_rows, whole
from facemllm.ingest.readers.headpose import degrees

HEAD_MM = 320.0
TWICE = {"15": "03", "18": "05", "21": "02", "22": "07"}
"""The second sequence of a person, and the first."""

Floats = NDArray[np.float64]
_FRAME = re.compile(r"(frame_\d+)_(?:rgb\.(?:png|jpe?g)|(pose)\.txt)", re.IGNORECASE)


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces sequence by sequence. Raises UserError when there is no sequence, or `rgb.cal` is needed and unusable."""
    home = labels.existing(root, "hpdb", "faces_0", ".")
    known = {f"{n:02d}" for n in range(1, 25)}
    found = folders(home)
    if not known & set(found):
        raise UserError(f"{home}: none of the folders 01 to 24; give the folder that holds hpdb")
    for name in found:
        if name not in known:
            yield Refused((home / name).relative_to(root).as_posix(), 0, "none of the sequences 01 to 24")
            continue
        yield from _sequence(home / name, root, options)


READERS = {"biwi": Reader(read, {"protocol": ("test", "own"), "crop": ("head", "none"), "every": ()}, ("test",))}


def rotation_degrees(rotation: Floats) -> dict[str, float]:
    """yaw, pitch, roll of a rotation (3, 3) in the camera's frame. Raises Refuse when it is none, or out of range."""
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2) or np.linalg.det(rotation) < 0:
        raise Refuse("the matrix is no rotation")
    yaw = math.atan2(rotation[0, 2], math.hypot(rotation[1, 2], rotation[2, 2]))
    pitch = math.atan2(rotation[1, 2], rotation[2, 2])
    roll = -math.atan2(rotation[0, 1], rotation[0, 0])
    return degrees(*(math.degrees(angle) for angle in (yaw, pitch, roll)))


def _sequence(folder: Path, root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    camera = _camera(folder / "rgb.cal") if options["crop"] == "head" else None
    person, split = TWICE.get(folder.name, folder.name), "test" if options["protocol"] == "test" else None
    pictures: dict[str, str] = {}
    poses: dict[str, str] = {}
    for name in files(folder):
        if part := _FRAME.fullmatch(name):
            (poses if part[2] else pictures)[part[1]] = name
    for stem in sorted(pictures | poses)[:: whole(options, "every", 1)]:
        picture = folder / pictures.get(stem, f"{stem}_rgb.png")
        file = picture.relative_to(root).as_posix()
        if stem not in poses:
            yield Refused(file, 0, f"no label row ({stem}_pose.txt)")
            continue
        more = partial(_pose, folder / poses[stem], root, camera)
        yield Face(source_id=f"{folder.name}/{stem}", image=picture, subject=person, split=split, more=more)


def _pose(path: Path, root: Path, camera: tuple[Floats, Floats, Floats] | None) -> dict[str, Any]:
    rows = small_rows(path, root)
    if [len(row) for row in rows] != [3, 3, 3, 3]:
        raise Refuse(f"{path.name}: not 3 rows of a rotation and 1 of the head's centre")
    numbers = np.array([[labels.number(text, path.name) for text in row] for row in rows])
    found: dict[str, Any] = dict(rotation_degrees(numbers[:3]))
    return found if camera is None else found | {"crop": _head(numbers[3], *camera)}


def _head(centre: Floats, lens: Floats, rotation: Floats, translation: Floats) -> Box:
    x, y, z = rotation @ centre + translation
    if z < HEAD_MM / 2:
        raise Refuse("the head's centre is not in front of the camera")
    across, down = lens[0, 0] * x / z + lens[0, 2], lens[1, 1] * y / z + lens[1, 2]
    half_x, half_y = lens[0, 0] * HEAD_MM / 2 / z, lens[1, 1] * HEAD_MM / 2 / z
    return across - half_x, down - half_y, across + half_x, down + half_y


def _camera(path: Path) -> tuple[Floats, Floats, Floats]:
    """Camera matrix (3, 3), rotation (3, 3) and translation (3,) of a calibration file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; without it the head cannot be framed: set the option crop: none")
    rows = [words for _, line in labels.lines(path) if len(words := line.split()) == 3]
    try:
        numbers = np.array([[float(text) for text in row] for row in rows])
    except ValueError as error:
        raise UserError(f"{path}: {error}; numbers were expected") from None
    if numbers.shape != (7, 3) or not np.isfinite(numbers).all():
        raise UserError(f"{path}: not a camera matrix, a rotation and a translation (7 rows of 3 finite numbers)")
    return numbers[:3], numbers[3:6], numbers[6]
