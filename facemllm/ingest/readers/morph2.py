"""MORPH II: mug shots with age, sex and race, several of each person over the years.

    morph_2008_nonCommercial.csv   id_num,picture_num,dob,doa,race,gender,facial_hair,age,age_diff,glasses,photo
    Album2/009055_1M54.JPG         `photo` is this relative path: id, number of the shot, sex, age

Race W white, B black, A asian, H hispanic, O other; sex M, F. `subject` is id_num.
Crop: pictures are used as they are. `source_id` is the photo's stem.
Refused: all rows of an id whose rows contradict one another in sex, race or date of birth (which of them is right
cannot be known); rows whose photo is named after another id, sex or age; rows that are ragged, twice there or out of
range. Unlisted pictures are not looked for.

Option `protocol`:
- subject_exclusive: the splits are drawn by person, so that nobody stands in two of them.
- random_80_20: 80 % of the pictures train, 20 % test, drawn by picture from a hash of their names (not the very
  pictures of published tables: no list of those is public). It puts pictures of one person on both sides by design, so
  its figures flatter a model and compare only with figures published under it. Since an import drops people who stand
  in two splits, `subject` is unknown in this protocol: deletion goes by picture then, not by person.
Source: https://uncw.edu/oic/tech/morph.html; Ricanek, Tesafaye, "MORPH", FG 2006; contradictions as reported by Yip and
others, arXiv 1811.06446.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, faces

GENDERS = {"M": "male", "F": "female"}
RACES = {"W": "white", "B": "black", "A": "asian", "H": "hispanic", "O": "other"}
COLUMNS = ("id_num", "dob", "race", "gender", "age")
_CONSTANT = {"gender": "sex", "race": "race", "dob": "date of birth"}
_UNKNOWN = ("", "NULL", "NA", "N/A")
_PHOTO = re.compile(r"(\d+)_\d+([MF])(\d+)", re.ASCII)


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of the table. Raises UserError when it is missing or lacks a column."""
    name = "morph_2008_nonCommercial.csv"
    path = labels.existing(root, name, f"MORPH_nonCommercial/{name}")
    contradictions = _contradictions(path, root)
    by_picture = options["protocol"] == "random_80_20"

    def face(number: int, values: Mapping[str, str]) -> Face:
        if reason := contradictions.get(_person(values)):
            raise Refuse(reason)
        picture = labels.inside(path.parent, values["photo"])
        facts = _facts(values)
        _agree(picture.stem, values)
        return Face(
            source_id=picture.stem,
            image=picture,
            subject=None if by_picture else _person(values),
            split=_random_split(picture.stem) if by_picture else None,
            labels=facts,
        )

    yield from faces(labels.table(path, root, "photo", COLUMNS), path.relative_to(root).as_posix(), face)


READERS = {"morph2": Reader(read, {"protocol": ("subject_exclusive", "random_80_20")}, ("train", "test"))}


def _person(values: Mapping[str, str]) -> str:
    return values["id_num"].lstrip("0")


def _contradictions(path: Path, root: Path) -> dict[str, str]:
    """People whose rows contradict one another, and in what; one short entry a person is kept."""
    first: dict[tuple[str, str], str] = {}
    found: dict[str, str] = {}
    for row in labels.table(path, root, "photo", COLUMNS):
        if isinstance(row, Refused):
            continue
        values, person = row[1], _person(row[1])
        for column, what in _CONSTANT.items():
            value = values[column].upper()
            if value in _UNKNOWN:
                continue
            if first.setdefault((person, column), value) != value:
                found.setdefault(person, f"the rows of id {values['id_num']} contradict one another in {what}")
    return found


def _facts(values: Mapping[str, str]) -> dict[str, float | str]:
    if not _person(values):
        raise Refuse("id_num is empty")
    found: dict[str, float | str] = {"age": labels.number(values["age"], "age", 0, 120)}
    for column, label, known in (("gender", "gender", GENDERS), ("race", "ethnicity", RACES)):
        value = values[column].upper()
        if value in known:
            found[label] = known[value]
        elif value not in _UNKNOWN:
            raise Refuse(f"{column} is {values[column]!r}, not one of {', '.join(known)}")
    return found


def _agree(stem: str, values: Mapping[str, str]) -> None:
    """Raises Refuse when the photo's name says another id, sex or age than its row."""
    named = _PHOTO.fullmatch(stem)
    if named is None:
        return
    said = (named[1].lstrip("0"), named[2], int(named[3]))
    row = (_person(values), values["gender"].upper(), int(float(values["age"])))
    for what, a, b in zip(("id", "sex", "age"), said, row, strict=True):
        if a != b and b not in _UNKNOWN:
            raise Refuse(f"the photo's name says {what} {a}, its row {b}")


def _random_split(stem: str) -> str:
    point = int.from_bytes(hashlib.sha256(f"morph2:80/20:{stem}".encode()).digest()[:8]) / 2**64
    return "train" if point < 0.8 else "test"
