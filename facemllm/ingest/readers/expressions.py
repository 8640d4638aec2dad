"""RAF-DB, AffectNet and Emo135: facial expressions in the wild.

RAF-DB: seven basic ones or eleven compound ones, with sex, race and age bin.

    basic/                                          compound/ is laid out alike
      EmoLabel/list_patition_label.txt              "train_00001.jpg 5"; the file name's spelling is the source's own
      Image/aligned/train_00001_aligned.jpg         100 x 100; the label file names pictures without `_aligned`
      Image/original/train_00001.jpg
      Annotation/manual/train_00001_manu_attri.txt  5 lines "x y", then sex, race and age bin, a line each
      Annotation/boundingbox/train_00001_boundingbox.txt   "left top right bottom", since release 1.1

Splits: the prefix of the name, `train_` or `test_` (train numbers have five digits, test numbers four: names are taken
as they stand, never padded); validation is carved out of train. People are unknown.
Crop: aligned pictures are used as they are; original ones are cropped to their box where `boundingbox` is there, else
left whole. Landmarks (left eye, right eye, nose, left and right mouth corner) refer to the original pictures and are
given with those only. Sex "unsure" is left out; a picture without a manual file keeps its expression alone.
Refused: rows that are ragged, twice there, of an unknown name or class; damaged manual files; original pictures without
a box where others have one; pictures without a label row. Emotion lists with three columns are not RAF-DB's own.

Options: `subset` (basic, compound), `pictures` (aligned, original). `source_id` is `basic/train_00001`: stems repeat
between the subsets.
Source: http://www.whdeng.cn/RAF/model1.html and its readme; Li, Deng, Du, "Reliable crowdsourcing and deep
locality-preserving learning for expression recognition in the wild", CVPR 2017. Unverified: the order of the eleven
compound classes (as public code has it), and where `boundingbox` lies (both places are searched).

AffectNet: expressions from the web, in both layouts that are about; which one lies there is found out.

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

Emo135: pictures of 135 emotions.
How its files lie on disk is not public; this reads the generic form, one folder an emotion, with or without folders of
splits above (grief/0001.jpg or train/grief/0001.jpg, val/grief/0002.jpg, test/grief/0003.jpg).

A folder's name becomes the expression in snake_case, a leading number left out ("012. Self-pity" is self_pity). Splits:
the folders train, val (or valid, validation) and test where all top folders are such; else none, and drawn by picture,
since people are unknown. Validation is carved out of train. Crop: pictures are used as they are.
Refused: files outside the folder of an emotion; folders inside one. `source_id` is the path without its ending.
Source: "135-class emotional facial expression dataset", IEEE DataPort; Chen and others, IEEE TAFFC 2022,
doi 10.1109/TAFFC.2022.3201290. Unverified: the layout as a whole.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.errors import UserError
from facemllm.ingest import labels, reader
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, code, faces, files, folders, small_rows, snake

OFFICIAL = ("train", "test")
RAF_DB_BASIC = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
RAF_DB_COMPOUND = (
    *("happily_surprised", "happily_disgusted", "sadly_fearful", "sadly_angry", "sadly_surprised", "sadly_disgusted"),
    *("fearfully_angry", "fearfully_surprised", "angrily_surprised", "angrily_disgusted", "disgustedly_surprised"),
)
RAF_DB_GENDERS = ("male", "female", None)
RAF_DB_RACES = ("caucasian", "african_american", "asian")
RAF_DB_AGES = ("0-3", "4-19", "20-39", "40-69", "70+")
_RAF_DB_NAME = re.compile(r"((train|test)_\d+)(?:_aligned)?\.jpg", re.ASCII)


def read_raf_db(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces of one subset, in its label file's order. Raises UserError when a file is missing or of another form."""
    subset, original = options["subset"], options["pictures"] == "original"
    home = labels.existing(root, f"{subset}/EmoLabel", "EmoLabel").parent
    if home == root and (folder_name := root.resolve().name) in ("basic", "compound") and folder_name != subset:
        raise UserError(
            f"{root}: this is the {folder_name} subset; say so in the source's options: subset: {folder_name}"
        )
    path = labels.existing(home, "EmoLabel/list_patition_label.txt", "EmoLabel/list_partition_label.txt")
    pictures = labels.existing(home, f"Image/{options['pictures']}")
    _check_columns(path)
    named: set[str] = set()

    def face(number: int, words: list[str]) -> Face:
        stem, split = _parsed(words[0])
        picture = pictures / (f"{stem}.jpg" if original else f"{stem}_aligned.jpg")
        named.add(picture.name)
        facts = {"expression": _raf_db_expression(words[1], subset)}
        more = partial(_raf_db_labels, home, stem, original)
        return Face(source_id=f"{subset}/{stem}", image=picture, split=split, labels=facts, more=more)

    yield from faces(labels.words(path, root, 2), path.relative_to(root).as_posix(), face)
    yield from reader.unlabelled(pictures, root, named, path.name)


def _check_columns(path: Path) -> None:
    number, first = next(labels.lines(path), (1, ""))
    if len(first.split()) != 2:
        raise UserError(
            f"{path}, line {number}: {first[:60]!r} has {len(first.split())} columns where RAF-DB's own file has two "
            "(picture, class); take the file of the original download"
        )


def _parsed(name: str) -> tuple[str, str]:
    found = _RAF_DB_NAME.fullmatch(name)
    if found is None:
        raise Refuse(f"{name!r} is no picture name of RAF-DB (train_00001.jpg, test_0001.jpg)")
    return found[1], found[2]


def _raf_db_expression(text: str, subset: str) -> str:
    names = RAF_DB_BASIC if subset == "basic" else RAF_DB_COMPOUND
    try:
        return str(code(text, names, f"the {subset} expression", first=1))
    except Refuse as error:
        hint = "; a compound list needs the option subset: compound" if text in ("8", "9", "10", "11") else ""
        raise Refuse(f"{error}{hint}") from None


def _raf_db_labels(home: Path, stem: str, original: bool) -> dict[str, Any]:
    """Labels from the picture's own files. Raises Refuse when one of them is damaged."""
    found: dict[str, Any] = {}
    manual = home / "Annotation" / "manual" / f"{stem}_manu_attri.txt"
    if manual.exists():
        rows = small_rows(manual, home)
        if [len(row) for row in rows] != [2] * 5 + [1] * 3:
            raise Refuse(f"{manual.name}: not five points and three codes")
        points = [[labels.number(v, f"{manual.name}: a landmark") for v in row] for row in rows[:5]]
        values = {
            "gender": code(rows[5][0], RAF_DB_GENDERS, f"{manual.name}: the sex"),
            "ethnicity": code(rows[6][0], RAF_DB_RACES, f"{manual.name}: the race"),
            "age_range": code(rows[7][0], RAF_DB_AGES, f"{manual.name}: the age bin"),
            "landmarks": points if original else None,
        }
        found = {key: value for key, value in values.items() if value is not None}
    boxes = next((b for b in (home / "Annotation/boundingbox", home / "boundingbox") if b.is_dir()), None)
    if original and boxes is not None:
        words = [word for row in small_rows(boxes / f"{stem}_boundingbox.txt", home) for word in row]
        if len(words) != 4:
            raise Refuse(f"{stem}_boundingbox.txt: {len(words)} numbers where a box has four")
        box = [labels.number(word, f"{stem}_boundingbox.txt: a side") for word in words]
        found |= {"box": box, "crop": tuple(box)}
    return found


AFFECTNET_CODES = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")
AFFECTNET_DROPPED = {8: "none", 9: "uncertain", 10: "non-face"}
AFFECTNET_COLUMNS = (
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height"),
    *("facial_landmarks", "expression", "valence", "arousal"),
)
_SETS = {"train_set": "train", "val_set": "test"}
_POINTS = 68


def read_affectnet(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
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
            yield from _affectnet_new(root, labels.existing(root, name), split, classes)
        return
    kind = "Manually" if options["annotated"] == "manual" else "Automatically"
    lists = {"training": "train", "validation": "test"} if kind == "Manually" else {"automatically_annotated": "train"}
    pictures = labels.existing(
        root, f"{kind}_Annotated/{kind}_Annotated_Images", f"{kind}_Annotated_Images", f"{kind}_Annotated"
    )
    for name, split in lists.items():
        places = (f"{kind}_Annotated_file_lists", f"{kind}_Annotated/{kind}_Annotated_file_lists", f"{kind}_Annotated")
        path = labels.existing(root, *(f"{place}/{name}.csv" for place in places), f"{name}.csv")
        yield from _affectnet_old(root, path, pictures, split, classes)


def _affectnet_old(root: Path, path: Path, pictures: Path, split: str, classes: int) -> Iterator[Face | Refused]:
    def face(number: int, values: Mapping[str, str]) -> Face:
        expression = _affectnet_expression(values["expression"], classes)
        picture = labels.inside(pictures, values["subDirectory_filePath"])
        left, top, width, height = (labels.number(values[column], column) for column in AFFECTNET_COLUMNS[1:5])
        if width <= 0 or height <= 0:
            raise Refuse(f"the face box is {width:g} x {height:g} pixels")
        points = _points(values["facial_landmarks"].split(";"))
        box = (left, top, left + width, top + height)
        facts = {"expression": expression, "box": list(box), "landmarks": points}
        own = picture.relative_to(pictures).with_suffix("").as_posix()
        return Face(source_id=own, image=picture, split=split, crop=box, labels=facts)

    rows = labels.table(path, root, AFFECTNET_COLUMNS[0], AFFECTNET_COLUMNS[1:7], without_header=AFFECTNET_COLUMNS)
    yield from faces(rows, path.relative_to(root).as_posix(), face)


def _affectnet_new(root: Path, folder: Path, split: str, classes: int) -> Iterator[Face | Refused]:
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
    found: dict[str, Any] = {"expression": _affectnet_expression(value, classes)}
    points = annotations / f"{stem}_lnd.npy"
    if points.exists():
        found["landmarks"] = _points(_array(points, root, 2 * _POINTS))
    return found


def _array(path: Path, root: Path, count: int) -> list[str]:
    """The `count` values of a .npy file, as text: numbers stand there as numbers or as strings. Raises Refuse."""
    import numpy as np

    file = io.BytesIO(reader.small(path, root))
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


def _affectnet_expression(text: str, classes: int) -> str:
    number = labels.number(text, "expression", 0, 10)
    if number != int(number):
        raise Refuse(f"expression is {text}, not a whole number")
    if number >= classes:
        called = AFFECTNET_DROPPED.get(int(number)) or AFFECTNET_CODES[int(number)]
        raise Refuse(f"expression is {int(number)} ({called}), not one of the {classes} classes")
    return AFFECTNET_CODES[int(number)]


def _points(values: list[str]) -> list[list[float]]:
    if len(values) != 2 * _POINTS:
        raise Refuse(f"{len(values)} landmark numbers where {_POINTS} points have {2 * _POINTS}")
    numbers = [labels.number(value, "a landmark") for value in values]
    return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]


SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


def read_emo135(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces, emotion by emotion. Raises UserError when no folder is there."""
    tops = folders(root)
    if not tops:
        raise UserError(f"{root}: no folder in it; Emo135 is read as one folder an emotion, as in grief/0001.jpg")
    split = all(name.lower() in SPLITS for name in tops)
    yield from _strays(root, root)
    for top in tops:
        if not split:
            yield from _emotion(root, root / top, None)
            continue
        yield from _strays(root, root / top)
        for name in folders(root / top):
            yield from _emotion(root, root / top / name, SPLITS[top.lower()])


def _strays(root: Path, folder: Path) -> Iterator[Refused]:
    for name in files(folder):
        yield Refused((folder / name).relative_to(root).as_posix(), 0, "not in the folder of an emotion")


def _emotion(root: Path, folder: Path, split: str | None) -> Iterator[Face | Refused]:
    expression = snake(re.sub(r"^\d+(?=\D)", "", folder.name))
    for name in reader.listing(folder):
        picture = folder / name
        file = picture.relative_to(root).as_posix()
        if picture.is_dir():
            yield Refused(file, 0, "a folder inside the folder of an emotion")
        elif not expression or expression.isdigit():
            yield Refused(file, 0, f"the folder {folder.name!r} names no emotion")
        elif picture.suffix.lower() not in reader.PICTURES:
            yield Refused(file, 0, f"not a picture by its name ({', '.join(reader.PICTURES)})")
        else:
            stem = picture.relative_to(root).with_suffix("").as_posix()
            yield Face(file=file, source_id=stem, image=picture, split=split, labels={"expression": expression})


READERS = {
    "raf-db": Reader(read_raf_db, {"subset": ("basic", "compound"), "pictures": ("aligned", "original")}, OFFICIAL),
    "affectnet": Reader(read_affectnet, {"classes": ("8", "7"), "annotated": ("manual", "automatic")}, OFFICIAL),
    "emo135": Reader(read_emo135, official=OFFICIAL),
}
