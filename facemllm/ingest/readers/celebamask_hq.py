"""CelebAMask-HQ: 30,000 pictures of CelebA at 1024 x 1024 with a mask of 512 x 512 for each part of the face.

    CelebA-HQ-img/0.jpg ... 29999.jpg
    CelebAMask-HQ-mask-anno/0/00000_skin.png    folder = number // 2000, number of five digits, one PNG a part
    CelebAMask-HQ-attribute-anno.txt            count, 40 names, then `0.jpg -1  1 ...`
    CelebAMask-HQ-pose-anno.txt                 optional: count, `Yaw Pitch Raw`, then `0.jpg 1.2 -3.4 5.6` (degrees)
    CelebA-HQ-to-CelebA-mapping.txt             `idx orig_idx orig_file`, then `0 119613 119614.jpg`
    list_eval_partition.txt                     CelebA's, for `splits: official`
    identity_CelebA.txt                         CelebA's, optional: subjects

The two files of CelebA may lie in the root, its Anno/ or Eval/, or in a folder CelebA/ or celeba/ in or beside it.

Splits: those of CelebA, through orig_file; orig_idx counts from 0 and would be one off. `splits: own` draws them by
person instead and needs neither partition nor mapping.
Crop: none, pictures and masks as they are. A PNG exists only for a part that is there; each is read as "not black"
(masks of other tools use palettes) and painted in the published order under the class that its name has, so that hair
lies over skin. Masks are read when their picture is.
Pose: taken for the output of HopeNet, and so for the signs of 300W-LP, as a thread in the dataset's repository says;
unverified. The columns are found by their names there, "Raw" being roll.

Refused: ragged and duplicate rows, an attribute that is neither of the file's two values, a picture without mapping or
split, without any mask, or with a mask that cannot be read or of another size than the others; a picture without a
label row. A damaged row of poses or identities is refused alone.

Source: Lee et al., MaskGAN: Towards Diverse and Interactive Facial Image Manipulation, CVPR 2020, and its repository.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.core import images
from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, contents, unlabelled_pictures
from facemllm.ingest.readers.celeba import PARTITION, Beside, find, pairs, sheet, split, subjects
from facemllm.tables.schemas import CELEBA, SEGMENTATION

_MASKS = "CelebAMask-HQ-mask-anno"
_MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
_FOLDER_OF = 2000
_DIGITS = 6
_MASK_PIXELS = 2048 * 2048
_ANGLES = {"yaw": "yaw", "pitch": "pitch", "raw": "roll", "roll": "roll"}


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """One face a row of the attributes, in its order, then what is left over.

    Raises UserError when a label file or folder is missing or has not the stated form.
    """
    official = options["splits"] == "official"
    place = labels.existing(root, "CelebA-HQ-img")
    labels.existing(root, _MASKS)
    main = sheet(labels.existing(root, "CelebAMask-HQ-attribute-anno.txt"), root)
    names = labels.attribute_names(main.path, main.line, main.columns, CELEBA)
    poses = _poses(root)
    known: dict[str, tuple[str | None, str | None]] = {}
    yield from _originals(root, official, known)
    coding, labelled = labels.Coding(), labels.Names()
    for row in main.rows:
        if isinstance(row, Refused):
            yield row
            continue
        line, name, values = row
        labelled.add(f"{place.name}/{name}")
        pose = poses.find(name) if poses else None
        yield from poses.refused() if poses else ()
        if isinstance(pose, Refused):
            yield pose
            pose = None
        try:
            path = labels.inside(place, name)
            if not (path.stem.isascii() and path.stem.isdecimal() and len(path.stem) <= _DIGITS):
                raise Refuse(f"{name} is no numbered picture, as 0.jpg")
            found = labels.attribute_columns(coding.truths(names, values)) | (pose or {})
            if official and path.stem not in known:
                raise Refuse(f"{name} has no split: no usable row in {_MAPPING} or {PARTITION}")
        except Refuse as error:
            yield Refused(main.name, line, str(error))
            continue
        subject, own = known.get(path.stem, (None, None))
        more = partial(_segmentation, root, int(path.stem))
        yield Face(row=line, source_id=path.stem, image=path, subject=subject, split=own, labels=found, more=more)
    yield from (row for row in (poses.rest() if poses else ()) if isinstance(row, Refused))
    yield from unlabelled_pictures(root, place, labelled)


READERS = {"celebamask-hq": Reader(read, {"splits": ("official", "own")}, ("train", "validation", "test"))}


def _segmentation(root: Path, number: int) -> dict[str, Any]:
    """The classes (height, width) of a picture: its part masks painted one over the other.

    Raises Refuse when it has none, when one cannot be read, or when they differ in size.
    """
    classes: NDArray[np.uint8] | None = None
    for value, part in enumerate(SEGMENTATION[1:], start=1):  # in the order in which they are painted
        name = f"{number:05d}_{part}.png"
        mask = _mask(root / _MASKS / str(number // _FOLDER_OF) / name, root)
        if mask is None:
            continue
        if classes is None:
            classes = np.zeros(mask.shape, np.uint8)
        if mask.shape != classes.shape:
            raise Refuse(
                f"mask {name} is {mask.shape[1]}x{mask.shape[0]}, others {classes.shape[1]}x{classes.shape[0]}"
            )
        classes[mask] = value
    if classes is None:
        raise Refuse(f"none of its masks is in {_MASKS}/{number // _FOLDER_OF}")
    return {"segmentation": classes}


def _mask(path: Path, root: Path) -> NDArray[np.bool_] | None:
    """Where a part is (height, width); None when the part has no file. Raises Refuse when it is no picture."""
    if not os.path.lexists(path):
        return None
    try:
        pixels = np.asarray(images.opened(contents(path, root, images.MAX_BYTES, f"mask {path.name}"), _MASK_PIXELS))
    except images.BadPicture as error:
        raise Refuse(f"mask {path.name}: {error}") from None
    lit: NDArray[np.bool_] = (pixels[..., 0] | pixels[..., 1] | pixels[..., 2]) > 0
    return lit


def _poses(root: Path) -> Beside[dict[str, float]] | None:
    path = root / "CelebAMask-HQ-pose-anno.txt"
    if not path.is_file():
        return None
    found = sheet(path, root)
    if sorted(_ANGLES.get(column.lower(), "") for column in found.columns) != ["pitch", "roll", "yaw"]:
        raise UserError(f"{path}, line {found.line}: columns {' '.join(found.columns)}; expected Yaw Pitch Raw")
    return Beside(found, _angles)


def _angles(row: Mapping[str, str]) -> dict[str, float]:
    return {_ANGLES[name.lower()]: labels.number(value, name.lower(), -180, 180) for name, value in row.items()}


def _originals(root: Path, official: bool, known: dict[str, tuple[str | None, str | None]]) -> Iterator[Refused]:
    """Fills `known`: picture number -> person, and split unless it is to be drawn. Yields rows that are refused.

    Of CelebA's own files, several times as long, only the rows of pictures that are mapped are kept.
    """
    if not official and not (root / _MAPPING).is_file():
        return
    path = labels.existing(root, _MAPPING)
    originals: dict[str, str] = {}
    top = next(islice(labels.lines(path), 1), (1, ""))
    if top[1].split() != ["idx", "orig_idx", "orig_file"]:
        raise UserError(f"{path}, line {top[0]}: {top[1].strip()!r}; expected idx orig_idx orig_file")
    for row in labels.words(path, root, 3, skip=top[0]):
        if isinstance(row, Refused):
            yield row
        elif row[1][2] in originals:
            yield Refused(_MAPPING, row[0], f"{row[1][2]} is mapped to {originals[row[1][2]]} already")
        else:
            originals[row[1][2]] = row[1][0]
    place, base = _celeba(root, "identity_CelebA")
    persons: dict[str, str] = {}
    if place and (found := subjects(place, base)):
        yield from _kept(found, originals, persons)
    splits: dict[str, str] = {}
    if official:
        place, base = _celeba(root, PARTITION)
        file = place and find(place, PARTITION)
        if not file:
            raise UserError(
                f"{root}: {PARTITION}.txt of CelebA is missing; put it there, or draw splits with the option splits=own"
            )
        yield from _kept(Beside(pairs(file, base, "partition"), split), originals, splits)
    for original, number in originals.items():
        if not official or original in splits:
            known[number] = persons.get(original), splits.get(original)


def _kept(rows: Beside[str], wanted: Mapping[str, str], kept: dict[str, str]) -> Iterator[Refused]:
    for row in rows.only(wanted):
        if isinstance(row, Refused):
            yield row
        else:
            kept[row[0]] = row[1]


def _celeba(root: Path, name: str) -> tuple[Path | None, Path]:
    """The folder of CelebA's own files that has this one, and what its path is written relative to."""
    beside = root.resolve().parent
    bases = [(root, root), *((over / folder, over) for over in (root, beside) for folder in ("CelebA", "celeba"))]
    return next(((place, base) for place, base in bases if find(place, name)), (None, root))
