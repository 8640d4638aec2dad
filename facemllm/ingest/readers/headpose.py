"""300W-LP and AFLW2000-3D: pose and landmarks of a fitted 3D model, one MATLAB file a picture.

300W-LP: faces of 300-W turned to large poses
    300W_LP/ (or its content at the root)
      AFW/ HELEN/ IBUG/ LFPW/        AFW_134212_1_0.jpg  AFW_134212_1_0.mat: <set>_<photo>[_<face>]_<view>
      AFW_Flip/ ... LFPW_Flip/       the same names, mirrored
      landmarks/ Code/               not read
Splits: `protocol: standard` puts all of it into training (validation is carved out), since its test set is AFLW2000-3D;
`protocol: own` draws all three splits. There are no identities: `subject` is the photograph (set and number), so that
views, faces and the mirrored picture of one photograph never fall into two splits. `flipped: without` leaves out the
mirrored folders; the published 122,450 pictures include them.
Unverified for want of the files: the names of the mirrored pictures (the photograph is found with or without `_Flip` in
them), and whether the numbers of photographs are unique within a set.

AFLW2000-3D: the first 2,000 pictures of AFLW; a test set
    AFLW2000/image00002.jpg  image00002.mat     or under AFLW2000-3D/AFLW2000, or at the root
Split: all of it is `test`, as published (trained on 300W-LP). Subjects are not known.

`Pose_Para` of a .mat is pitch, yaw, roll (radians), tdx, tdy, tdz, scale. Its signs are those of the whole project, in
degrees: yaw > 0 points the nose to the image's left, pitch > 0 up, roll > 0 leans the head clockwise in the image.
Landmarks: `pt2d` where it holds 68 points, else `pt3d_68` (x, y), as they are, whether they count pixels from 0 or 1.
Copies of AFLW2000 are said to hold 21 points in `pt2d`, with -1 for those out of sight (prior knowledge); published
code takes the corners of `pt2d` with these -1; here the 68 points frame both datasets alike.
Crop: the loose frame of the published evaluations on AFLW2000-3D (HopeNet, 6DRepNet), k = 0.20: the box around the 68
landmarks, then left and top moved out by 2k = 0.4 of its width and height. Their code moves the right and the bottom
side by 2k and 0.6k of the box as it is by then, 1.4 times as large, so these sides move by 0.56 and 0.168 of the first
box; that is kept, since a figure compares only with pictures that are framed alike. Beyond the picture, where their
code pads with black, the crop ends.
Refused: pictures without .mat, .mat without pose or landmarks, angles beyond 99 degrees (the published rule; about 31
of the 2,000).
Source: http://www.cbsr.ia.ac.cn/users/xiangyuzhu/projects/3DDFA/main.htm; Zhu and others, CVPR 2016.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Box, Face, Reader, Refuse, Refused, files, small

SETS = ("AFW", "HELEN", "IBUG", "LFPW")
LIMIT = 99.0
"""Degrees: the published protocol leaves out samples with an angle beyond (bins of 3 degrees from -99)."""
_PHOTO = re.compile(r"(.+?_\d+)(?:_\d+)?_\d+")
_K = 0.20
_GROWN = 1 + 2 * _K

MAX_INFLATED = 2**20
_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC_CLASSES = range(6, 16)
_COMPLEX = 0x800
_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def read_300w_lp(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces set by set, mirrored ones after the others. Raises UserError when there is no set."""
    home = labels.existing(root, "300W_LP", ".")
    labels.existing(home, *SETS)
    ends = ("", "_Flip") if options["flipped"] == "with" else ("",)
    split = "train" if options["protocol"] == "standard" else None
    for folder in (home / f"{name}{end}" for end in ends for name in SETS):
        for found in _annotated(folder, root, split) if folder.is_dir() else ():
            if isinstance(found, Face):
                name = f"{folder.name}/{found.source_id}"
                found = replace(found, source_id=name, subject=photograph(found.source_id))
            yield found


def read_aflw2000(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of their names. Raises UserError when there is neither picture nor .mat file."""
    home = labels.existing(root, "AFLW2000-3D/AFLW2000", "AFLW2000", ".")
    empty = True
    for found in _annotated(home, root, "test"):
        empty = False
        yield found
    if empty:
        raise UserError(f"{home}: neither .jpg nor .mat files; give the folder that holds AFLW2000")


READERS = {
    "300w-lp": Reader(
        read_300w_lp, {"protocol": ("standard", "own"), "flipped": ("with", "without")}, ("train", "test")
    ),
    "aflw2000": Reader(read_aflw2000, official=("test",)),
}


def photograph(stem: str) -> str:
    """The photograph behind a view: `AFW_134212_1_0` -> `AFW_134212`, `LFPW_image_test_0001_12` ->
    `LFPW_image_test_0001`."""
    plain = re.sub(r"(?i)_flip(?=_|$)", "", stem)
    found = _PHOTO.fullmatch(plain)
    return found[1] if found else plain


def _annotated(folder: Path, root: Path, split: str | None) -> Iterator[Face | Refused]:
    """A face for every .mat in a folder, in name order; a picture without one is refused. The picture may be missing.
    Raises UserError when the folder cannot be listed."""
    names = files(folder)
    pictures = {Path(name).stem: name for name in names if name.lower().endswith(".jpg")}
    mats = {Path(name).stem: name for name in names if name.lower().endswith(".mat")}
    for stem in sorted(pictures | mats):
        picture = folder / pictures.get(stem, f"{stem}.jpg")
        file = picture.relative_to(root).as_posix()
        if stem in mats:
            more = partial(from_mat, folder / mats[stem], root)
            yield Face(file=file, source_id=stem, image=picture, split=split, more=more)
        else:
            yield Refused(file, 0, f"no label row ({stem}.mat)")


def from_mat(path: Path, root: Path) -> dict[str, Any]:
    """yaw, pitch, roll (degrees), landmarks (68 in pixels, where there are so many) and crop of one .mat file.

    Raises Refuse when it is missing, too large, damaged, without pose or landmarks, or with an angle out of range.
    """
    found = arrays(small(path, root), ("Pose_Para", "pt2d", "pt3d_68"))
    pose = found.get("Pose_Para", np.empty(0)).reshape(-1)
    if pose.size < 3:
        raise Refuse(f"{path.name} has no Pose_Para with pitch, yaw and roll")
    pitch, yaw, roll = np.degrees(pose[:3]).tolist()
    facts: dict[str, Any] = dict(degrees(yaw, pitch, roll))
    points = _points(found)
    if not len(points) or not np.isfinite(points).all():
        raise Refuse(f"{path.name} has no finite landmarks (pt2d or pt3d_68)")
    if len(points) == 68:
        facts["landmarks"] = points.tolist()
    return facts | {"crop": framed(points)}


def _points(found: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    flat, solid = found.get("pt2d", np.empty((2, 0))), found.get("pt3d_68", np.empty((3, 0)))
    if flat.shape == (2, 68):
        return flat.T
    if solid.shape == (3, 68):
        return solid[:2].T
    if flat.shape[0] != 2:
        return np.empty((0, 2))
    return flat.T[(flat != -1).all(axis=0)]  # -1 marks a point that is not visible


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


def arrays(data: bytes, names: Collection[str]) -> dict[str, NDArray[np.float64]]:
    """The two-dimensional numeric arrays of those names in a MATLAB 5 file (.mat as MATLAB 5 to 7.2 writes it).

    A general reader (SciPy's) also builds cells, structures, objects and functions; here they are passed over unread,
    so that a hostile file can build nothing but arrays of numbers of bounded size. Layout: MathWorks, "MAT-File
    Format", level 5. Raises Refuse when it is damaged, is of MATLAB 4 or 7.3, or holds an array in another form.
    """
    if len(data) < _HEADER or data[126:128] not in (b"IM", b"MI"):
        raise Refuse("no MATLAB 5 file")
    order = "<" if data[126:128] == b"IM" else ">"
    if struct.unpack_from(f"{order}H", data, 124)[0] != 0x0100:
        raise Refuse("no MATLAB 5 file; one of MATLAB 7.3 has to be saved again with -v7")
    found: dict[str, NDArray[np.float64]] = {}
    for kind, content in _elements(data[_HEADER:], order):
        if kind == _COMPRESSED:
            kind, content = next(_elements(_inflated(content), order), (0, b""))
        if kind == _MATRIX:
            name, array = _array(content, order, names)
            if array is not None:
                found[name] = array
    return found


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise Refuse("the MATLAB file is cut short")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # type and size share four bytes, and the content the next four
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data):
            raise Refuse("the MATLAB file is cut short")
        yield kind, data[start : start + size]
        at = start + size
        if kind != _COMPRESSED:
            at += -at % 8


def _inflated(data: bytes) -> bytes:
    try:
        inflated = zlib.decompressobj().decompress(data, MAX_INFLATED + 1)
    except zlib.error as error:
        raise Refuse(f"the MATLAB file is damaged ({error})") from None
    if len(inflated) > MAX_INFLATED:
        raise Refuse(f"a variable of the MATLAB file inflates to more than {MAX_INFLATED:,} bytes")
    return inflated


def _array(content: bytes, order: str, names: Collection[str]) -> tuple[str, NDArray[np.float64] | None]:
    parts = _elements(content, order)
    flags, shape, name = (next(parts, (0, b""))[1] for _ in range(3))
    if len(flags) != 8:
        raise Refuse("the MATLAB file is damaged (a variable without flags)")
    called = name.decode("ascii", "replace")
    if called not in names:
        return called, None
    flag = struct.unpack_from(f"{order}I", flags)[0]
    kind, numbers = next(parts, (0, b""))
    if flag & 0xFF not in _NUMERIC_CLASSES or flag & _COMPLEX or kind not in _DTYPES or len(shape) != 8:
        raise Refuse(f"{called} is no matrix of real numbers")
    rows, columns = struct.unpack(f"{order}ii", shape)
    dtype = np.dtype(order + _DTYPES[kind])
    if rows < 0 or columns < 0 or rows * columns * dtype.itemsize != len(numbers):
        raise Refuse(f"{called} does not hold {rows} x {columns} numbers")
    return called, np.frombuffer(numbers, dtype).astype(np.float64).reshape((rows, columns), order="F")
