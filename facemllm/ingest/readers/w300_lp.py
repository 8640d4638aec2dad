"""300W-LP: faces of 300-W turned to large poses by a fitted 3D model, with pose and 68 landmarks.

    300W_LP/ (or its content at the root)
      AFW/ HELEN/ IBUG/ LFPW/        AFW_134212_1_0.jpg  AFW_134212_1_0.mat: <set>_<photo>[_<face>]_<view>
      AFW_Flip/ ... LFPW_Flip/       the same names, mirrored
      landmarks/ Code/               not read

`Pose_Para` of a .mat is pitch, yaw, roll (radians), tdx, tdy, tdz, scale; its signs are the ones of the whole project.
Splits: `protocol: standard` puts all of it into training (validation is carved out), since its test set is AFLW2000-3D;
`protocol: own` draws all three splits. There are no identities: `subject` is the photograph (set and number), so that
views, faces and the mirrored picture of one photograph never fall into two splits. `flipped: without` leaves out the
mirrored folders; the published 122,450 pictures include them.
Crop: the published loose frame, see `headpose`. Landmarks are taken as they are, whether they count pixels from 0 or 1.
Refused: pictures without .mat, .mat without pose or landmarks, angles beyond 99 degrees (the published rule).
Unverified for want of the files: the names of the mirrored pictures (the photograph is found with or without `_Flip` in
them), and whether the numbers of photographs are unique within a set.
Source: http://www.cbsr.ia.ac.cn/users/xiangyuzhu/projects/3DDFA/main.htm; Zhu and others, CVPR 2016.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Refused
from facemllm.ingest.readers.headpose import annotated, from_mat

KEY = "300w-lp"
OPTIONS: dict[str, tuple[str, ...]] = {"protocol": ("standard", "own"), "flipped": ("with", "without")}
OFFICIAL = ("train", "test")

SETS = ("AFW", "HELEN", "IBUG", "LFPW")
_FLIP = "_Flip"
_PHOTO = re.compile(r"(.+?_\d+)(?:_\d+)?_\d+")


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces set by set, mirrored ones after the others. Raises UserError when there is no set."""
    home = labels.existing(root, "300W_LP", ".")
    labels.existing(home, *SETS)
    ends = ("", _FLIP) if options["flipped"] == "with" else ("",)
    split = "train" if options["protocol"] == "standard" else None
    for folder in (home / f"{name}{end}" for end in ends for name in SETS):
        for found in annotated(folder, root) if folder.is_dir() else ():
            if isinstance(found, Refused):
                yield found
                continue
            stem, picture, mat = found
            yield Face(
                file=picture.relative_to(root).as_posix(),
                source_id=f"{folder.name}/{stem}",
                image=picture,
                subject=photograph(stem),
                split=split,
                more=partial(from_mat, mat, root),
            )


def photograph(stem: str) -> str:
    """The photograph behind a view: `AFW_134212_1_0` -> `AFW_134212`, `LFPW_image_test_0001_12` ->
    `LFPW_image_test_0001`."""
    plain = re.sub(r"(?i)_flip(?=_|$)", "", stem)
    found = _PHOTO.fullmatch(plain)
    return found[1] if found else plain
