"""AgeDB, FG-NET, UTKFace, MORPH II and FairFace: ages, in years or bins, in names of pictures or in tables.

AgeDB: people of public life
    AgeDB/12083_ElsaMartinelli_74_f.jpg     or the pictures at the root: number, name, age, sex
A name may hold any characters, `_` included: the first field is the number, the last two are age and sex.
`subject` is the name, with its accents in one form (the same name is stored composed or decomposed by different
systems). Splits: none; drawn by person. Crop: pictures are used as they are.
Refused: files that are named otherwise, ages above 120, a number that stands there twice.
Source: https://ibug.doc.ic.ac.uk/resources/agedb/; Moschoglou and others, "AgeDB", CVPR Workshops 2017.

FG-NET ageing database: 82 people from childhood to old age, about a thousand scanned pictures
    images/078A11.JPG      person 078 at 11 years; a letter tells pictures of one age apart: 001A43a.JPG
    points/078a11.pts      68 landmarks of it, in small letters; optional
`subject` is the person's number. Splits: none; drawn by person. Crop: pictures are used as they are.
Refused: files that are named otherwise, damaged point files. A picture without a point file has no landmarks.
Source: https://yanweifu.github.io/FG_NET_data/; Panis and others, "Overview of research on facial ageing using the
FG-NET ageing database", IET Biometrics 2016. Unverified: whether its points count pixels from 0 or 1 (they are given as
they stand), and that the folders are always named so (pictures at the root are read, too).

UTKFace: age, sex and race
    UTKFace/25_0_2_20170104020210475.jpg.chip.jpg     aligned and cropped, 200 x 200
    part1/ part2/ part3/25_0_2_20170104020210475.jpg  in the wild
A name is [age]_[sex]_[race]_[date and time]: age 0 to 116; sex 0 male, 1 female; race 0 white, 1 black, 2 asian,
3 indian, 4 others. Splits: none; drawn by picture, since people are unknown. The aligned and the wild version of a
picture have the same `source_id` and so fall into the same split.
Crop: aligned pictures are used as they are, wild ones whole. Option: `pictures` (aligned, wild).
Refused: names in which a label is missing or out of range (39_1_20170116174525125, 61_1_20170109142408075,
61_1_20170109150557335, 61_3_20170109150557335, 53__0_20170116184028385: public repairs disagree, so none is guessed),
a stem that stands there twice, files that are named otherwise. Names whose ending alone is damaged (…357jpg, …272.pg,
a blank before .jpg) have all their labels and are read; the content says what format they are.
Source: https://susanqq.github.io/UTKFace/; Zhang, Song, Qi, "Age progression/regression by conditional adversarial
autoencoder", CVPR 2017.

MORPH II: mug shots with age, sex and race, several of each person over the years.

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

FairFace: age bin, sex and race, balanced over seven races.

    fairface_label_train.csv    file,age,gender,race,service_test; "train/9.jpg,10-19,Male,White,True"
    fairface_label_val.csv
    fairface-img-margin025-trainval/{train,val}/9.jpg    padding 0.25, the main experiments; or {train,val} at the root
    fairface-img-margin125-trainval/{train,val}/9.jpg    padding 1.25, for commercial services

Splits: the official validation split is the test split (there is no public one); validation is carved out of train.
People are unknown. Crop: the source's own face chips are used as they are.
Age bins stand in `age_range` as 0-2, 3-9, ... 60-69, 70+ ("more than 70" in the source); races are white, black,
latino_hispanic, east_asian, southeast_asian, indian, middle_eastern.
Refused: rows that are ragged, twice there, or of an unknown value; bins that a spreadsheet has turned into dates
(3-Sep, Oct-19); pictures without a label row. `service_test` is the text True or False, compared as text.

Options: `margin` (025, 125); `rows` (all, service_test: only those of the service test).
Source: https://github.com/joojs/fairface; Kärkkäinen, Joo, "FairFace", WACV 2021.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, faces, files, small_rows, snake, unlabelled

GENDERS = ("male", "female")
UTKFACE_RACES = ("white", "black", "asian", "indian", "others")
_AGEDB = re.compile(r"([0-9]+)_(.*\S.*)_([0-9]{1,3})_([fm])\.jpe?g", re.IGNORECASE)
_FGNET = re.compile(r"(\d{3})A(\d{2})[a-z]?\.jpe?g", re.ASCII | re.IGNORECASE)
_UTKFACE = re.compile(r"(\d{1,3})_([01])_([0-4])_\d{8,}", re.ASCII)
_ENDING = re.compile(r"[ .]*[a-z]+(\.chip\.jpg)?", re.ASCII | re.IGNORECASE)
_OLDEST = {"agedb": 120, "utkface": 116}
_POINTS = 68


def read_agedb(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of their file names. Raises UserError when there is none."""
    home = labels.existing(root, "AgeDB", ".")
    numbers: set[str] = set()
    for name in _pictures(home, "AgeDB are named as 12083_ElsaMartinelli_74_f.jpg"):
        file = (home / name).relative_to(root).as_posix()
        found = _AGEDB.fullmatch(name)
        if found is None:
            yield Refused(file, 0, "the name is not [number]_[name]_[age]_[f or m].jpg")
        elif int(found[3]) > _OLDEST["agedb"]:
            yield Refused(file, 0, f"the age is {found[3]}, outside 0 to {_OLDEST['agedb']}")
        elif found[1] in numbers:
            yield Refused(file, 0, f"number {found[1]} stands there already")
        else:
            numbers.add(found[1])
            facts = {"age": float(found[3]), "gender": GENDERS[found[4].lower() == "f"]}
            person = unicodedata.normalize("NFC", found[2])
            yield Face(file=file, source_id=Path(name).stem, image=home / name, subject=person, labels=facts)


def read_fgnet(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of their file names. Raises UserError when there is none."""
    home = labels.existing(root, "images", "Images", ".")
    folder = next((root / name for name in ("points", "Points") if (root / name).is_dir()), None)
    points = {name.lower(): name for name in files(folder)} if folder else {}
    for name in _pictures(home, "FG-NET are named as 078A11.JPG"):
        file = (home / name).relative_to(root).as_posix()
        found = _FGNET.fullmatch(name)
        if found is None:
            yield Refused(file, 0, "the name is not [person]A[age][letter].jpg")
            continue
        stem = Path(name).stem
        own = points.get(f"{stem.lower()}.pts")
        more = partial(_landmarks, folder / own, root) if folder and own else None
        facts = {"age": float(found[2])}
        yield Face(file=file, source_id=stem, image=home / name, subject=found[1], labels=facts, more=more)


def _pictures(home: Path, named: str) -> list[str]:
    if names := files(home):
        return names
    raise UserError(f"{home}: no picture in it; pictures of {named}")


def _landmarks(path: Path, root: Path) -> dict[str, Any]:
    """Landmarks of a .pts file: a header, and the points between braces. Raises Refuse."""
    rows = small_rows(path, root)
    if ["{"] not in rows or rows[-1] != ["}"]:
        raise Refuse(f"{path.name}: no points between braces")
    points = rows[rows.index(["{"]) + 1 : -1]
    if len(points) != _POINTS or any(len(point) != 2 for point in points):
        raise Refuse(f"{path.name}: not {_POINTS} points of two numbers")
    return {"landmarks": [[labels.number(value, f"{path.name}: a point") for value in point] for point in points]}


def read_utkface(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of their names. Raises UserError when no such picture lies there."""
    if options["pictures"] == "aligned":
        homes = [labels.existing(root, "UTKFace", "crop_part1", ".")]
        hint = "option pictures: wild reads part1 to part3"
    else:
        homes = [root / part for part in ("part1", "part2", "part3") if (root / part).is_dir()]
        hint = "in-the-wild pictures lie in part1, part2, part3"
    pictures = [home / name for home in homes for name in files(home)]
    if not pictures:
        raise UserError(f"{root}: no {options['pictures']} picture of UTKFace in it; {hint}")
    seen: set[str] = set()
    yield from (_utkface(root, picture, seen) for picture in pictures)


def _utkface(root: Path, picture: Path, seen: set[str]) -> Face | Refused:
    file = picture.relative_to(root).as_posix()
    found = _UTKFACE.match(picture.name)
    if found is None or not _ENDING.fullmatch(picture.name, found.end()):
        return Refused(file, 0, "the name is not [age]_[sex]_[race]_[date].jpg; what is missing there is not guessed")
    if int(found[1]) > _OLDEST["utkface"]:
        return Refused(file, 0, f"the age is {int(found[1])}, outside 0 to {_OLDEST['utkface']}")
    if found[0] in seen:
        return Refused(file, 0, f"{found[0]} stands there already")
    seen.add(found[0])
    facts = {"age": float(found[1]), "gender": GENDERS[int(found[2])], "ethnicity": UTKFACE_RACES[int(found[3])]}
    return Face(file=file, source_id=found[0], image=picture, labels=facts)


MORPH2_GENDERS = {"M": "male", "F": "female"}
MORPH2_RACES = {"W": "white", "B": "black", "A": "asian", "H": "hispanic", "O": "other"}
_MORPH2_COLUMNS = ("id_num", "dob", "race", "gender", "age")
_CONSTANT = {"gender": "sex", "race": "race", "dob": "date of birth"}
_UNKNOWN = ("", "NULL", "NA", "N/A")
_PHOTO = re.compile(r"(\d+)_\d+([MF])(\d+)", re.ASCII)


def read_morph2(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of the table. Raises UserError when it is missing or lacks a column."""
    name = "morph_2008_nonCommercial.csv"
    path = labels.existing(root, name, f"MORPH_nonCommercial/{name}")
    contradictions = _contradictions(path, root)
    by_picture = options["protocol"] == "random_80_20"

    def face(number: int, values: Mapping[str, str]) -> Face:
        if reason := contradictions.get(_person(values)):
            raise Refuse(reason)
        picture = labels.inside(path.parent, values["photo"])
        facts = _morph2_labels(values)
        _agree(picture.stem, values)
        subject, split = (None, _random_split(picture.stem)) if by_picture else (_person(values), None)
        return Face(source_id=picture.stem, image=picture, subject=subject, split=split, labels=facts)

    yield from faces(labels.table(path, root, "photo", _MORPH2_COLUMNS), path.relative_to(root).as_posix(), face)


def _person(values: Mapping[str, str]) -> str:
    return values["id_num"].lstrip("0")


def _contradictions(path: Path, root: Path) -> dict[str, str]:
    """People whose rows contradict one another, and in what; one short entry a person is kept."""
    first: dict[tuple[str, str], str] = {}
    found: dict[str, str] = {}
    for row in labels.table(path, root, "photo", _MORPH2_COLUMNS):
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


def _morph2_labels(values: Mapping[str, str]) -> dict[str, float | str]:
    if not _person(values):
        raise Refuse("id_num is empty")
    found: dict[str, float | str] = {"age": labels.number(values["age"], "age", 0, 120)}
    for column, label, known in (("gender", "gender", MORPH2_GENDERS), ("race", "ethnicity", MORPH2_RACES)):
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


FAIRFACE_AGES = {age: age for age in ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69")}
FAIRFACE_AGES["more than 70"] = "70+"
FAIRFACE_GENDERS = {"Male": "male", "Female": "female"}
FAIRFACE_RACES = {
    race: snake(race)
    for race in ("White", "Black", "Latino_Hispanic", "East Asian", "Southeast Asian", "Indian", "Middle Eastern")
}
_DATE = re.compile(r"jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|\d+[-/.]\d+[-/.]\d+", re.IGNORECASE)


def read_fairface(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of the label files, train first. Raises UserError when one is missing or has other columns."""
    folder = f"fairface-img-margin{options['margin']}-trainval"
    places = (folder, ".") if options["margin"] == "025" else (folder,)
    pictures = labels.existing(root, *(f"{place}/train" for place in places)).parent
    columns = ("age", "gender", "race", *(("service_test",) if options["rows"] == "service_test" else ()))
    for part, split in (("train", "train"), ("val", "test")):
        path = labels.existing(root, f"fairface_label_{part}.csv")
        named: set[str] = set()
        face = partial(_fairface, folder=pictures / part, split=split, rows=options["rows"], named=named)
        yield from faces(labels.table(path, root, "file", columns), path.name, face)
        yield from unlabelled(labels.existing(pictures, part), root, named, path.name)


def _fairface(
    number: int, values: Mapping[str, str], folder: Path, split: str, rows: str, named: set[str]
) -> Face | None:
    """The face of a row, whose picture joins those that are `named`; None outside the chosen rows. Raises Refuse."""
    picture = labels.inside(folder.parent, values["file"])
    if picture.parent != folder:
        raise Refuse(f"file is {values['file']!r}, not {folder.name}/<number>.jpg")
    named.add(picture.name)
    facts = {
        "age_range": _one_of(FAIRFACE_AGES, values["age"], "age"),
        "gender": _one_of(FAIRFACE_GENDERS, values["gender"], "gender"),
        "ethnicity": _one_of(FAIRFACE_RACES, values["race"], "race"),
    }
    if rows == "service_test":
        if values["service_test"] not in ("True", "False"):
            raise Refuse(f"service_test is {values['service_test']!r}, not True or False")
        if values["service_test"] == "False":
            return None
    return Face(source_id=f"{folder.name}/{picture.stem}", image=picture, split=split, labels=facts)


def _one_of(known: dict[str, str], value: str, what: str) -> str:
    if value in known:
        return known[value]
    if what == "age" and _DATE.search(value):
        raise Refuse(
            f"age is {value!r}: a spreadsheet turned the bin into a date; use the label file as it was downloaded"
        )
    raise Refuse(f"{what} is {value!r}, not one of {', '.join(known)}")


READERS = {
    "agedb": Reader(read_agedb),
    "fgnet": Reader(read_fgnet),
    "utkface": Reader(read_utkface, {"pictures": ("aligned", "wild")}),
    "morph2": Reader(read_morph2, {"protocol": ("subject_exclusive", "random_80_20")}, ("train", "test")),
    "fairface": Reader(read_fairface, {"margin": ("025", "125"), "rows": ("all", "service_test")}, ("train", "test")),
}
