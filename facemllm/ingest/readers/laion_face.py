"""LAION-Face: web pictures with faces and their alternative texts, as downloaded by its scripts.

    laion_face_data/ (or its content at the root)
      split_00000/ ... split_00031/        00000.tar ... as img2dataset writes them, see `shards`
    detection_metadata/                    sample2detect_0.pth ... sample2detect_31.pth, see `detections`

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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Refuse, Refused
from facemllm.ingest.readers.choices import share, whole
from facemllm.ingest.readers.detections import Detections, load
from facemllm.ingest.readers.files import folders
from facemllm.ingest.readers.shards import Sample, samples, tars, widened

KEY = "laion-face"
OPTIONS: dict[str, tuple[str, ...]] = {
    "detections": ("files", "none"),
    "nsfw": ("refuse", "keep"),
    "min_score": (),
    "min_side": (),
}
OFFICIAL: tuple[str, ...] = ()

MIN_SCORE = 0.98
MIN_SIDE = 128
_PART = re.compile(r"split_(\d{1,5})")
_FOLDERS = ("detection_metadata", "face_detections", ".")


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
        left, top, right, bottom = face[:4].tolist()
        yield Face(
            file=sample.file,
            source_id=name,
            image=sample.picture,
            subject=number if len(faces) > 1 else None,
            crop=widened((left, top, right, bottom)),
            labels=facts | {"box": face[:4].tolist(), "landmarks": face[4:14].reshape(5, 2).tolist()},
        )


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
