"""FG-NET ageing database: 82 people from childhood to old age, about a thousand scanned pictures.

    images/078A11.JPG      person 078 at 11 years; a letter tells pictures of one age apart: 001A43a.JPG
    points/078a11.pts      68 landmarks of it, in small letters; optional

`subject` is the person's number. Splits: none; drawn by person. Crop: pictures are used as they are.
Refused: files that are named otherwise, damaged point files. A picture without a point file has no landmarks.
Source: https://yanweifu.github.io/FG_NET_data/; Panis and others, "Overview of research on facial ageing using the
FG-NET ageing database", IET Biometrics 2016. Unverified: whether its points count pixels from 0 or 1 (they are given as
they stand), and that the folders are always named so (pictures at the root are read, too).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Refuse, Refused
from facemllm.ingest.readers.files import files, small_rows

KEY = "fgnet"
OPTIONS: dict[str, tuple[str, ...]] = {}
OFFICIAL = ()

_NAME = re.compile(r"(\d{3})A(\d{2})[a-z]?\.jpe?g", re.ASCII | re.IGNORECASE)
_POINTS = 68


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of their file names. Raises UserError when there is none."""
    home = labels.existing(root, "images", "Images", ".")
    folder = next((root / name for name in ("points", "Points") if (root / name).is_dir()), None)
    points = {name.lower(): name for name in files(folder)} if folder else {}
    names = files(home)
    if not names:
        raise UserError(f"{home}: no picture in it; pictures of FG-NET are named as 078A11.JPG")
    for name in names:
        file = (home / name).relative_to(root).as_posix()
        found = _NAME.fullmatch(name)
        if found is None:
            yield Refused(file, 0, "the name is not [person]A[age][letter].jpg")
            continue
        stem = Path(name).stem
        own = points.get(f"{stem.lower()}.pts")
        yield Face(
            file=file,
            source_id=stem,
            image=home / name,
            subject=found[1],
            labels={"age": float(found[2])},
            more=partial(_landmarks, folder / own, root) if folder and own else None,
        )


def _landmarks(path: Path, root: Path) -> dict[str, Any]:
    """Landmarks of a .pts file: a header, and the points between braces. Raises Refuse."""
    rows = small_rows(path, root)
    if ["{"] not in rows or rows[-1] != ["}"]:
        raise Refuse(f"{path.name}: no points between braces")
    points = rows[rows.index(["{"]) + 1 : -1]
    if len(points) != _POINTS or any(len(point) != 2 for point in points):
        raise Refuse(f"{path.name}: not {_POINTS} points of two numbers")
    return {"landmarks": [[labels.number(value, f"{path.name}: a point") for value in point] for point in points]}
