"""FairFace: age bin, sex and race, balanced over seven races.

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

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, faces, snake, unlabelled

AGES = {age: age for age in ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69")}
AGES["more than 70"] = "70+"
GENDERS = {"Male": "male", "Female": "female"}
RACES = {
    race: snake(race)
    for race in ("White", "Black", "Latino_Hispanic", "East Asian", "Southeast Asian", "Indian", "Middle Eastern")
}
_DATE = re.compile(r"jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|\d+[-/.]\d+[-/.]\d+", re.IGNORECASE)


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of the label files, train first. Raises UserError when one is missing or has other columns."""
    folder = f"fairface-img-margin{options['margin']}-trainval"
    places = (folder, ".") if options["margin"] == "025" else (folder,)
    pictures = labels.existing(root, *(f"{place}/train" for place in places)).parent
    columns = ("age", "gender", "race", *(("service_test",) if options["rows"] == "service_test" else ()))
    for part, split in (("train", "train"), ("val", "test")):
        path = labels.existing(root, f"fairface_label_{part}.csv")
        named: set[str] = set()
        face = partial(_face, folder=pictures / part, split=split, rows=options["rows"], named=named)
        yield from faces(labels.table(path, root, "file", columns), path.name, face)
        yield from unlabelled(labels.existing(pictures, part), root, named, path.name)


READERS = {"fairface": Reader(read, {"margin": ("025", "125"), "rows": ("all", "service_test")}, ("train", "test"))}


def _face(number: int, values: Mapping[str, str], folder: Path, split: str, rows: str, named: set[str]) -> Face | None:
    """The face of a row, whose picture joins those that are `named`; None outside the chosen rows. Raises Refuse."""
    picture = labels.inside(folder.parent, values["file"])
    if picture.parent != folder:
        raise Refuse(f"file is {values['file']!r}, not {folder.name}/<number>.jpg")
    named.add(picture.name)
    facts = _facts(values)
    if rows == "service_test" and not _in_service_test(values["service_test"]):
        return None
    return Face(source_id=f"{folder.name}/{picture.stem}", image=picture, split=split, labels=facts)


def _facts(values: Mapping[str, str]) -> dict[str, str]:
    return {
        "age_range": _one_of(AGES, values["age"], "age"),
        "gender": _one_of(GENDERS, values["gender"], "gender"),
        "ethnicity": _one_of(RACES, values["race"], "race"),
    }


def _one_of(known: dict[str, str], value: str, what: str) -> str:
    if value in known:
        return known[value]
    if what == "age" and _DATE.search(value):
        raise Refuse(
            f"age is {value!r}: a spreadsheet turned the bin into a date; use the label file as it was downloaded"
        )
    raise Refuse(f"{what} is {value!r}, not one of {', '.join(known)}")


def _in_service_test(value: str) -> bool:
    if value not in ("True", "False"):
        raise Refuse(f"service_test is {value!r}, not True or False")
    return value == "True"
