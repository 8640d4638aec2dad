"""RAF-DB: expressions in the wild, seven basic ones or eleven compound ones, with sex, race and age bin.

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
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, code, faces, small_rows, unlabelled

BASIC = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
COMPOUND = (
    *("happily_surprised", "happily_disgusted", "sadly_fearful", "sadly_angry", "sadly_surprised", "sadly_disgusted"),
    *("fearfully_angry", "fearfully_surprised", "angrily_surprised", "angrily_disgusted", "disgustedly_surprised"),
)
GENDERS = ("male", "female", None)
RACES = ("caucasian", "african_american", "asian")
AGES = ("0-3", "4-19", "20-39", "40-69", "70+")
_NAME = re.compile(r"((train|test)_\d+)(?:_aligned)?\.jpg", re.ASCII)


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces of one subset, in its label file's order. Raises UserError when a file is missing or of another form."""
    subset, original = options["subset"], options["pictures"] == "original"
    home = labels.existing(root, f"{subset}/EmoLabel", "EmoLabel").parent
    if home == root and (told := root.resolve().name) in ("basic", "compound") and told != subset:
        raise UserError(f"{root}: this is the {told} subset; say so in the source's options: subset: {told}")
    path = labels.existing(home, "EmoLabel/list_patition_label.txt", "EmoLabel/list_partition_label.txt")
    pictures = labels.existing(home, f"Image/{options['pictures']}")
    _check_columns(path)
    named: set[str] = set()

    def face(number: int, words: list[str]) -> Face:
        stem, split = _parsed(words[0])
        picture = pictures / (f"{stem}.jpg" if original else f"{stem}_aligned.jpg")
        named.add(picture.name)
        expression = _expression(words[1], subset)
        return Face(
            source_id=f"{subset}/{stem}",
            image=picture,
            split=split,
            labels={"expression": expression},
            more=partial(_more, home, stem, original),
        )

    yield from faces(labels.words(path, root, 2), path.relative_to(root).as_posix(), face)
    yield from unlabelled(pictures, root, named, path.name)


READERS = {
    "raf-db": Reader(read, {"subset": ("basic", "compound"), "pictures": ("aligned", "original")}, ("train", "test"))
}


def _check_columns(path: Path) -> None:
    number, first = next(labels.lines(path), (1, ""))
    if len(first.split()) != 2:
        raise UserError(
            f"{path}, line {number}: {first[:60]!r} has {len(first.split())} columns where RAF-DB's own file has two "
            "(picture, class); take the file of the original download"
        )


def _parsed(name: str) -> tuple[str, str]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise Refuse(f"{name!r} is no picture name of RAF-DB (train_00001.jpg, test_0001.jpg)")
    return found[1], found[2]


def _expression(text: str, subset: str) -> str:
    names = BASIC if subset == "basic" else COMPOUND
    try:
        return str(code(text, names, f"the {subset} expression", first=1))
    except Refuse as error:
        hint = "; a compound list needs the option subset: compound" if text in ("8", "9", "10", "11") else ""
        raise Refuse(f"{error}{hint}") from None


def _more(home: Path, stem: str, original: bool) -> dict[str, Any]:
    """Labels from the picture's own files. Raises Refuse when one of them is damaged."""
    found: dict[str, Any] = {}
    manual = home / "Annotation" / "manual" / f"{stem}_manu_attri.txt"
    if manual.exists():
        rows = small_rows(manual, home)
        if [len(row) for row in rows] != [2] * 5 + [1] * 3:
            raise Refuse(f"{manual.name}: not five points and three codes")
        points = [[labels.number(v, f"{manual.name}: a landmark") for v in row] for row in rows[:5]]
        values = {
            "gender": code(rows[5][0], GENDERS, f"{manual.name}: the sex"),
            "ethnicity": code(rows[6][0], RACES, f"{manual.name}: the race"),
            "age_range": code(rows[7][0], AGES, f"{manual.name}: the age bin"),
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
