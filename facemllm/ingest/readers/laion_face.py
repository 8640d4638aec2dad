"""LAION-Face: web pictures with faces and their alternative texts, as downloaded by its scripts.

    laion_face_data/ (or its content at the root)
      split_00000/ ... split_00031/        00000.tar ... as img2dataset writes them, see `ingest.shards`
    detection_metadata/                    sample2detect_0.pth ... sample2detect_31.pth, see `load`

The .json of a sample holds NSFW, similarity, LICENSE and SAMPLE_ID (a whole number, often written as a float).
One picture gives one row a detected face: box, five landmarks, `alt_text` (the .txt, else the caption in the .json).
Crop: the detector's box, widened by 0.25 of its width and height on each side. `detections: none` takes pictures whole.
Filters, each refusing with its reason: `nsfw: refuse` takes only NSFW = UNLIKELY (`keep` takes all); `min_score`
(default 0.98) and `min_side` (default 128 pixels, of both sides), the values of FaceCaption-15M.
`source_id` is SAMPLE_ID, with `/0`, `/1`, ... where the detector found several faces; these share a `subject`, the
picture, so that no split tears it apart. Other subjects are not known. Splits: drawn.
Refused, too: samples without .json, SAMPLE_ID or detections, ids that come twice (not noticed with `detections: none`,
save in one shard), members that are hostile, shards that break off.
Unverified for want of the files: that boxes are in pixels of the picture as stored (the download does not resize).
Source: https://github.com/FacePerceiver/LAION-Face; Zheng and others, CVPR 2022.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.errors import UserError, one_line
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, folders, share, whole
from facemllm.ingest.shards import Sample, samples, tars, widened

MIN_SCORE = 0.98
MIN_SIDE = 128
_PART = re.compile(r"split_(\d{1,5})")
_FOLDERS = ("detection_metadata", "face_detections", ".")
FIELDS = 15
"""Numbers a face: left, top, right, bottom; five landmarks x, y; score."""


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces part by part. Raises UserError when there is no part, or a part's detections are missing or unsound."""
    home = labels.existing(root, "laion_face_data", ".")
    parts = [found for name in folders(home) if (found := _PART.fullmatch(name))]
    if not parts:
        raise UserError(f"{home}: no folders split_00000, split_00001, ...; give the folder that holds them")
    limits = share(options, "min_score", MIN_SCORE), whole(options, "min_side", MIN_SIDE, low=0)
    for part in parts:
        faces = load(_detections(root, int(part[1]))) if options["detections"] == "files" else None
        met = np.zeros(0 if faces is None else len(faces.ids), np.bool_)
        for shard in tars(home / part[0]):
            for sample in samples(shard, root):
                yield from [sample] if isinstance(sample, Refused) else _faces(sample, faces, met, limits, options)


READERS = {
    "laion-face": Reader(
        read, {"detections": ("files", "none"), "nsfw": ("refuse", "keep"), "min_score": (), "min_side": ()}
    )
}


def _detections(root: Path, part: int) -> Path:
    name = f"sample2detect_{part}.pth"
    for folder in _FOLDERS:
        if (root / folder / name).is_file():
            return root / folder / name
    raise UserError(
        f"{root / _FOLDERS[0] / name} is missing; LAION-Face publishes it (download_detection.sh), or set the option "
        "detections: none to take pictures whole"
    )


def _faces(
    sample: Sample,
    found: Detections | None,
    met: NDArray[np.bool_],
    limits: tuple[float, int],
    options: Mapping[str, str],
) -> Iterator[Face | Refused]:
    try:
        number, facts = _number(sample, options["nsfw"] == "refuse")
        assert sample.picture is not None
        if found is None:
            yield Face(file=sample.file, source_id=number, image=sample.picture, labels=facts)
            return
        place = found.find(int(number))
        if place < 0:
            raise Refuse(f"no detections for SAMPLE_ID {number}")
        if met[place]:
            raise Refuse(f"SAMPLE_ID {number} was there already")
        met[place] = True
        faces = found.at(place)
        if not len(faces):
            raise Refuse("the detector found no face")
    except Refuse as error:
        yield Refused(sample.file, 0, str(error))
        return
    for index, face in enumerate(faces.astype(float)):
        name = f"{number}/{index}" if len(faces) > 1 else number
        if reason := _reason(face, *limits):
            yield Refused(sample.file, 0, f"face {index}: {reason}" if len(faces) > 1 else reason)
            continue
        left, top, right, bottom = box = face[:4].tolist()
        subject, crop = number if len(faces) > 1 else None, widened((left, top, right, bottom))
        said = facts | {"box": box, "landmarks": face[4:14].reshape(5, 2).tolist()}
        yield Face(file=sample.file, source_id=name, image=sample.picture, subject=subject, crop=crop, labels=said)


def _number(sample: Sample, only_unlikely: bool) -> tuple[str, dict[str, Any]]:
    """SAMPLE_ID and what is known of the whole picture. Raises Refuse."""
    facts = sample.facts
    if sample.picture is None:
        raise Refuse("the picture is missing")
    if facts is None:
        raise Refuse("no label row (the .json beside it)")
    if only_unlikely and facts.get("NSFW") != "UNLIKELY":
        raise Refuse(f"NSFW is {facts.get('NSFW')!r}, not 'UNLIKELY'")
    try:
        number = int(text) if (text := str(facts.get("SAMPLE_ID")).strip()).isdecimal() else int(float(text))
    except (ValueError, OverflowError):
        raise Refuse(f"SAMPLE_ID is {facts.get('SAMPLE_ID')!r}, not a number") from None
    if not 0 <= number < 2**63:
        raise Refuse(f"SAMPLE_ID is {number}, out of range")
    caption = facts.get("caption")
    alt = sample.text or (caption.strip() if isinstance(caption, str) else "")
    return str(number), {"alt_text": alt} if alt else {}


def _reason(face: NDArray[np.float64], min_score: float, min_side: int) -> str:
    if not np.isfinite(face).all():
        return "a damaged detection"
    width, height, score = face[2] - face[0], face[3] - face[1], face[14]
    if width <= 0 or height <= 0:
        return "the box is empty"
    if score < min_score and not math.isclose(score, min_score, rel_tol=1e-6):  # stored as a 32-bit float
        return f"score {score:.3f}, below {min_score:g}"
    if min(width, height) < min_side:
        return f"a box of {width:.0f}x{height:.0f} pixels, smaller than {min_side}"
    return ""


@dataclass(frozen=True)
class Detections:
    """Faces by sample: sorted ids (n,), where each one's faces start (n + 1,), and the faces (m, 15).

    A face that does not hold 15 numbers is a row of NaN.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    faces: NDArray[np.float32]

    def find(self, sample: int) -> int:
        """The place of a sample; -1 when it is not there."""
        at = int(np.searchsorted(self.ids, sample))
        return at if at < len(self.ids) and int(self.ids[at]) == sample else -1

    def at(self, place: int) -> NDArray[np.float32]:
        """The faces (k, 15) of the sample at a place, in the detector's order."""
        return self.faces[self.starts[place] : self.starts[place + 1]]


def load(path: Path) -> Detections:
    """The detections of one part: a pickled mapping of SAMPLE_ID to (box, landmarks, score).

    A pickle can run code when it is read, so it is read by PyTorch's restricted reader (`weights_only=True`), which
    builds containers, numbers and tensors; arrays and numbers of numpy, which these files hold, are admitted on top.
    The mapping is packed into three arrays at once, about 70 bytes a face; while a part is read, its objects need some
    600. Raises UserError when the file holds anything else.
    """
    import torch

    try:
        with torch.serialization.safe_globals(_admitted()):
            table = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can raise almost anything from its reader
        raise UserError(
            f"{path}: not read, since it is damaged or holds more than numbers ({one_line(error, 200)})"
        ) from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: holds no mapping of SAMPLE_ID to faces; give the file as LAION-Face publishes it")
    try:
        return packed(table)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: no mapping of SAMPLE_ID to lists of (box, landmarks, score): {error}") from None


def packed(table: dict[Any, Any]) -> Detections:
    """A mapping of SAMPLE_ID to lists of (box, landmarks, score) as arrays. Empties the mapping while it is read, so
    that both are never held whole."""
    keys = sorted(table, key=_sample_id)
    ids = np.fromiter(map(_sample_id, keys), np.int64, len(keys))
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(table[key]) for key in keys], out=starts[1:])
    faces = np.full((int(starts[-1]), FIELDS), np.nan, np.float32)
    for start, key in zip(starts, keys, strict=False):
        for row, face in enumerate(table.pop(key), start=int(start)):
            faces[row] = _packed_face(face)
    return Detections(ids, starts, faces)


def _sample_id(key: Any) -> int:
    return int(key) if isinstance(key, int | np.integer) else int(float(key))


def _packed_face(face: Any) -> NDArray[np.float32]:
    try:
        box, landmarks, score = face
        parts = [np.asarray(part, np.float32).reshape(-1) for part in (box, landmarks, score)]
    except (TypeError, ValueError):
        parts = []
    if [part.size for part in parts] != [4, 10, 1]:
        return np.full(FIELDS, np.nan, np.float32)
    return np.concatenate(parts)


def _admitted() -> list[Any]:
    """What numpy's arrays and numbers are pickled with, under its names of today and of before numpy 2."""
    from numpy._core import multiarray

    functions: Mapping[str, Any] = {"_reconstruct": multiarray._reconstruct, "scalar": multiarray.scalar}
    named = [(f, f"numpy.{core}.multiarray.{n}") for n, f in functions.items() for core in ("_core", "core")]
    kinds = [type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8")]
    return [*named, np.ndarray, np.dtype, *kinds]
