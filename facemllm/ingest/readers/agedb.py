"""AgeDB: people of public life with their age in years.

    AgeDB/12083_ElsaMartinelli_74_f.jpg     or the pictures at the root: number, name, age, sex

A name may hold any characters, `_` included: the first field is the number, the last two are age and sex.
`subject` is the name, with its accents in one form (the same name is stored composed or decomposed by different
systems). Splits: none; drawn by person. Crop: pictures are used as they are.
Refused: files that are named otherwise, ages above 120, a number that stands there twice.
Source: https://ibug.doc.ic.ac.uk/resources/agedb/; Moschoglou and others, "AgeDB", CVPR Workshops 2017.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Refused
from facemllm.ingest.readers.files import files

KEY = "agedb"
OPTIONS: dict[str, tuple[str, ...]] = {}
OFFICIAL = ()

GENDERS = {"f": "female", "m": "male"}
_NAME = re.compile(r"([0-9]+)_(.*\S.*)_([0-9]{1,3})_([fm])\.jpe?g", re.IGNORECASE)


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of their file names. Raises UserError when there is none."""
    home = labels.existing(root, "AgeDB", ".")
    names = files(home)
    if not names:
        raise UserError(f"{home}: no picture in it; pictures of AgeDB are named as 12083_ElsaMartinelli_74_f.jpg")
    numbers: set[str] = set()
    for name in names:
        file = (home / name).relative_to(root).as_posix()
        found = _NAME.fullmatch(name)
        if found is None:
            yield Refused(file, 0, "the name is not [number]_[name]_[age]_[f or m].jpg")
        elif int(found[3]) > 120:
            yield Refused(file, 0, f"the age is {found[3]}, outside 0 to 120")
        elif found[1] in numbers:
            yield Refused(file, 0, f"number {found[1]} stands there already")
        else:
            numbers.add(found[1])
            facts = {"age": float(found[3]), "gender": GENDERS[found[4].lower()]}
            person = unicodedata.normalize("NFC", found[2])
            yield Face(file=file, source_id=Path(name).stem, image=home / name, subject=person, labels=facts)
