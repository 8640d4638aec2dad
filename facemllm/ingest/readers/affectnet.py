"""AffectNet: expressions from the web, in both layouts that are about; which one lies there is found out.

Old, with whole pictures:                              New, with cropped faces:
    Manually_Annotated_file_lists/training.csv           train_set/images/0.jpg
    Manually_Annotated_file_lists/validation.csv         train_set/annotations/0_exp.npy    one code
    Manually_Annotated/Manually_Annotated_Images/        train_set/annotations/0_lnd.npy    68 points, x y x y ...
      689/737db2.jpg                                     val_set/ alike
    Automatically_Annotated_file_lists/automatically_annotated.csv
    Automatically_Annotated/Automatically_Annotated_Images/

The lists have the columns subDirectory_filePath, face_x, face_y, face_width, face_height, facial_landmarks (68 points,
numbers parted by `;`), expression, valence, arousal; some copies lack the header and are read in this order.
Splits: training and train_set are train; validation and val_set are the test split, as the field uses them; validation
is carved out of train; the automatic list is train. People are unknown.
Crop: old layout, the box face_x, face_y, face_width, face_height; new layout, pictures as they are.
Codes: 0 neutral, 1 happiness, 2 sadness, 3 surprise, 4 fear, 5 disgust, 6 anger, 7 contempt; 8 none, 9 uncertain and
10 non-face are refused row by row, and contempt, too, where `classes` is 7. Valence and arousal have no column in the
table of faces and are not read.
Refused: rows that are ragged, twice there, or have no box; damaged .npy files (pickles are never loaded); in the new
layout pictures without an annotation. Unlisted pictures of the old layout are not looked for.

Options: `classes` (8, 7); `annotated` (manual, automatic) picks the list of the old layout.
Source: http://mohammadmahoor.com/affectnet/; Mollahosseini, Hasani, Mahoor, "AffectNet", IEEE TAC 2019; the layouts as
public code reads them. Unverified: that a list without header keeps the order of columns.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, faces, files, small

CODES = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")
DROPPED = {8: "none", 9: "uncertain", 10: "non-face"}
COLUMNS = (
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height"),
    *("facial_landmarks", "expression", "valence", "arousal"),
)
_SETS = {"train_set": "train", "val_set": "test"}
_POINTS = 68


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces, train before test. Raises UserError when neither layout is there, or both."""
    classes = int(options["classes"])
    new = any((root / name).is_dir() for name in _SETS)
    old = any(root.glob("*_[Aa]nnotated*"))
    if new and old:
        raise UserError(f"{root}: holds both layouts of AffectNet; give a folder that holds one of them")
    if not (new or old):
        raise UserError(
            f"{root}: neither train_set and val_set nor Manually_Annotated_file_lists are in it; give its folder"
        )
    if new:
        for name, split in _SETS.items():
            yield from _new(root, labels.existing(root, name), split, classes)
        return
    kind = "Manually" if options["annotated"] == "manual" else "Automatically"
    lists = {"training": "train", "validation": "test"} if kind == "Manually" else {"automatically_annotated": "train"}
    pictures = labels.existing(
        root, f"{kind}_Annotated/{kind}_Annotated_Images", f"{kind}_Annotated_Images", f"{kind}_Annotated"
    )
    for name, split in lists.items():
        places = (f"{kind}_Annotated_file_lists", f"{kind}_Annotated/{kind}_Annotated_file_lists", f"{kind}_Annotated")
        path = labels.existing(root, *(f"{place}/{name}.csv" for place in places), f"{name}.csv")
        yield from _old(root, path, pictures, split, classes)


READERS = {"affectnet": Reader(read, {"classes": ("8", "7"), "annotated": ("manual", "automatic")}, ("train", "test"))}


def _old(root: Path, path: Path, pictures: Path, split: str, classes: int) -> Iterator[Face | Refused]:
    def face(number: int, values: Mapping[str, str]) -> Face:
        expression = _expression(values["expression"], classes)
        picture = labels.inside(pictures, values["subDirectory_filePath"])
        left, top, width, height = (labels.number(values[column], column) for column in COLUMNS[1:5])
        if width <= 0 or height <= 0:
            raise Refuse(f"the face box is {width:g} x {height:g} pixels")
        points = _points(values["facial_landmarks"].split(";"))
        box = (left, top, left + width, top + height)
        return Face(
            source_id=picture.relative_to(pictures).with_suffix("").as_posix(),
            image=picture,
            split=split,
            crop=box,
            labels={"expression": expression, "box": list(box), "landmarks": points},
        )

    rows = labels.table(path, root, COLUMNS[0], COLUMNS[1:7], without_header=COLUMNS)
    yield from faces(rows, path.relative_to(root).as_posix(), face)


def _new(root: Path, folder: Path, split: str, classes: int) -> Iterator[Face | Refused]:
    """Every picture or annotation of one set by its number; one without the other is refused."""
    images = labels.existing(folder, "images")
    annotations = labels.existing(folder, "annotations")
    pictures = {Path(name).stem: name for name in files(images)}
    labelled = {name.removesuffix("_exp.npy") for name in files(annotations) if name.endswith("_exp.npy")}
    for stem in sorted(labelled | set(pictures), key=lambda stem: (len(stem), stem)):
        picture = images / pictures.get(stem, f"{stem}.jpg")
        file = picture.relative_to(root).as_posix()
        if stem not in labelled:
            yield Refused(file, 0, f"no {stem}_exp.npy in {annotations.relative_to(root).as_posix()}")
            continue
        more = partial(_annotated, annotations, root, stem, classes)
        yield Face(file=file, source_id=f"{folder.name}/{stem}", image=picture, split=split, more=more)


def _annotated(annotations: Path, root: Path, stem: str, classes: int) -> dict[str, Any]:
    """Labels of one picture of the new layout. Raises Refuse for a dropped class or a damaged file."""
    (value,) = _array(annotations / f"{stem}_exp.npy", root, 1)
    found: dict[str, Any] = {"expression": _expression(value, classes)}
    points = annotations / f"{stem}_lnd.npy"
    if points.exists():
        found["landmarks"] = _points(_array(points, root, 2 * _POINTS))
    return found


def _array(path: Path, root: Path, count: int) -> list[str]:
    """The `count` values of a .npy file, as text: numbers stand there as numbers or as strings. Raises Refuse."""
    import numpy as np

    file = io.BytesIO(small(path, root))
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = header(file)
    except ValueError:
        raise Refuse(f"{path.name}: not a NumPy array") from None
    data = file.read()
    # the header is checked before anything of the size it claims is reserved
    if kind.kind not in "iufU" or not kind.itemsize or int(np.prod(shape, dtype=object)) != count:
        raise Refuse(f"{path.name}: {kind} of shape {shape}, not {count} numbers")
    if len(data) != count * kind.itemsize:
        raise Refuse(f"{path.name}: {len(data)} bytes of numbers where its header says {count * kind.itemsize}")
    return [str(value) for value in np.frombuffer(data, kind)]


def _expression(text: str, classes: int) -> str:
    number = labels.number(text, "expression", 0, 10)
    if number != int(number):
        raise Refuse(f"expression is {text}, not a whole number")
    if number >= classes:
        called = DROPPED.get(int(number)) or CODES[int(number)]
        raise Refuse(f"expression is {int(number)} ({called}), not one of the {classes} classes")
    return CODES[int(number)]


def _points(values: list[str]) -> list[list[float]]:
    if len(values) != 2 * _POINTS:
        raise Refuse(f"{len(values)} landmark numbers where {_POINTS} points have {2 * _POINTS}")
    numbers = [labels.number(value, "a landmark") for value in values]
    return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
