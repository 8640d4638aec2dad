"""AFLW2000-3D: the first 2,000 pictures of AFLW with pose and landmarks of a fitted 3D model; a test set.

    AFLW2000/image00002.jpg  image00002.mat     or under AFLW2000-3D/AFLW2000, or at the root

`Pose_Para` is pitch, yaw, roll in **radians**, as in 300W-LP and with the same signs.
Split: all of it is `test`, as published (trained on 300W-LP). Subjects are not known.
Crop: the published loose frame, see `headpose`. Landmarks: `pt2d` where it holds 68 points, else `pt3d_68` (x, y). The
latter is prior knowledge: copies are said to hold 21 points in `pt2d`, with -1 for those out of sight. Published code
takes the corners of `pt2d` with these -1; here the 68 points frame both datasets alike.
Refused: pictures without .mat, .mat without pose or landmarks, angles beyond 99 degrees (about 31 of 2,000, as in the
published protocol).
Source: http://www.cbsr.ia.ac.cn/users/xiangyuzhu/projects/3DDFA/main.htm; Zhu and others, CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Refused
from facemllm.ingest.readers.headpose import annotated, from_mat

KEY = "aflw2000"
OPTIONS: dict[str, tuple[str, ...]] = {}
OFFICIAL = ("test",)


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of their names. Raises UserError when there is neither picture nor .mat file."""
    home = labels.existing(root, "AFLW2000-3D/AFLW2000", "AFLW2000", ".")
    empty = True
    for found in annotated(home, root):
        empty = False
        if isinstance(found, Refused):
            yield found
            continue
        stem, picture, mat = found
        file = picture.relative_to(root).as_posix()
        yield Face(file=file, source_id=stem, image=picture, split="test", more=partial(from_mat, mat, root))
    if empty:
        raise UserError(f"{home}: neither .jpg nor .mat files; give the folder that holds AFLW2000")
