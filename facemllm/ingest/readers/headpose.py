"""300W-LP and AFLW2000-3D: pose and landmarks of a fitted 3D model, one MATLAB file a picture. BIWI: measured pose.

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

BIWI Kinect Head Pose: 24 sequences of 20 people, the head's rotation and place in every frame.

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
from facemllm.ingest.reader import Box, Face, Reader, Refuse, Refused, files, folders, small, small_rows, whole

Floats = NDArray[np.float64]
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

HEAD_MM = 320.0
TWICE = {"15": "03", "18": "05", "21": "02", "22": "07"}
"""The second sequence of a person, and the first."""

_FRAME = re.compile(r"(frame_\d+)_(?:rgb\.(?:png|jpe?g)|(pose)\.txt)", re.IGNORECASE)


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
    found = list(_annotated(home, root, "test"))
    if not found:
        raise UserError(f"{home}: neither .jpg nor .mat files; give the folder that holds AFLW2000")
    yield from found


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


def _points(found: dict[str, Floats]) -> Floats:
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


def framed(points: Floats) -> Box:
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


def arrays(data: bytes, names: Collection[str]) -> dict[str, Floats]:
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
    found: dict[str, Floats] = {}
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


def _array(content: bytes, order: str, names: Collection[str]) -> tuple[str, Floats | None]:
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


def read_biwi(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
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


READERS = {
    "300w-lp": Reader(
        read_300w_lp, {"protocol": ("standard", "own"), "flipped": ("with", "without")}, ("train", "test")
    ),
    "aflw2000": Reader(read_aflw2000, official=("test",)),
    "biwi": Reader(read_biwi, {"protocol": ("test", "own"), "crop": ("head", "none"), "every": ()}, ("test",)),
}
