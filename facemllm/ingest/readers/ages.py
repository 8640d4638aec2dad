"""AgeDB, FG-NET and UTKFace: ages in years that stand in the names of the pictures.

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
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, files, small_rows

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
    seen: set[str] = set()
    empty = True
    for home in homes:
        for name in files(home):
            empty = False
            yield _utkface(root, home, name, seen)
    if empty:
        raise UserError(f"{root}: no {options['pictures']} picture of UTKFace in it; {hint}")


def _utkface(root: Path, home: Path, name: str, seen: set[str]) -> Face | Refused:
    file = (home / name).relative_to(root).as_posix()
    found = _UTKFACE.match(name)
    if found is None or not _ENDING.fullmatch(name, found.end()):
        return Refused(file, 0, "the name is not [age]_[sex]_[race]_[date].jpg; what is missing there is not guessed")
    if int(found[1]) > _OLDEST["utkface"]:
        return Refused(file, 0, f"the age is {int(found[1])}, outside 0 to {_OLDEST['utkface']}")
    if found[0] in seen:
        return Refused(file, 0, f"{found[0]} stands there already")
    seen.add(found[0])
    facts = {"age": float(found[1]), "gender": GENDERS[int(found[2])], "ethnicity": UTKFACE_RACES[int(found[3])]}
    return Face(file=file, source_id=found[0], image=home / name, labels=facts)


READERS = {
    "agedb": Reader(read_agedb),
    "fgnet": Reader(read_fgnet),
    "utkface": Reader(read_utkface, {"pictures": ("aligned", "wild")}),
}
