"""MAAD-Face: 47 attributes for the 3.3 million pictures of VGGFace2.

    MAAD_Face.csv                 Filename,Identity and 47 columns: `n000002/0001_01.jpg,2,1,-1,0,...`
    train/n000002/0001_01.jpg     VGGFace2; also test/, val/, or the folders of persons without any of these, right in
    test/n000001/0001_01.jpg      the root or in a folder data/ or VGGFace2/

1 is present, -1 absent, 0 undefined: such an attribute is left out, never false. The header is taken in any case and
with blanks or `_`; a column without a name (a saved index) is passed over. `Male` also gives gender, as annotated.
The attributes were transferred by classifiers: 91 % right by human check, Brown_Eyes and some others below 70 %.

Subject: the person's folder. Splits: the folder that the person lies in (persons of train and test are disjoint);
validation is carved out of train by person (a val/ joins it). Without such folders all are drawn by person.
Crop: none; the pictures of VGGFace2 are loose crops of faces already.

Refused: ragged rows and duplicates, a value other than 1, -1, 0, an Identity that is not the Filename's (one row of the
release is said to have such: `713\\`), a Filename that is no person's picture, a person who lies in two splits, a
picture without a label row.

Source: Terhörst et al., MAAD-Face, IEEE TIFS 2021, and its repository; that VGGFace2's pictures are loose crops is said
in its readme. The exact spelling of the header is unverified, hence the tolerance.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest import attributes, labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, faces, folders, unlabelled_pictures

_PERSON = re.compile(r"n\d{6}", re.ASCII)
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test", "": None}
_BASES = ("", "data", "VGGFace2")


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """One face a row of MAAD_Face.csv, in its order, then the pictures that it does not name.

    Raises UserError when the file or the persons' folders are missing, or a column is missing or unknown.
    """
    path = labels.existing(root, "MAAD_Face.csv", "maad/MAAD_Face.csv", "MAAD-Face/MAAD_Face.csv")
    people, twice = _people(root)
    numbered = labels.lines(path)
    line, first = next(numbered, (1, ""))
    header = [part.strip() for part in next(csv.reader([first]), [])]
    places, names = _columns(path, line, header)
    seen, labelled = labels.Names(), labels.Names()

    def face(line: int, text: str) -> Face:
        values = _fields(text, len(header))
        name, person = _name(values[places["filename"]], values[places["identity"]])
        if not seen.add(name):
            raise Refuse(f"{name} has a row already")
        folder, split = people.get(person, (root / person, None))
        picture = labels.inside(folder, name.rpartition("/")[2])
        place = picture.relative_to(root).as_posix()
        labelled.add(place)
        if person in twice:
            raise Refuse(f"{person} lies in {' and '.join(twice[person])}; a person is in one split only")
        found = attributes.labels(attributes.known(names, [values[places[name]] for name in names]))
        own = f"{person}/{picture.stem}"
        return Face(source_id=own, image=picture, subject=person, split=split, labels=found)

    yield from faces(numbered, path.relative_to(root).as_posix(), face)
    for folder, _ in people.values():
        yield from unlabelled_pictures(root, folder, labelled)


READERS = {"maad-face": Reader(read, official=("train", "test"))}


def _columns(path: Path, line: int, header: list[str]) -> tuple[dict[str, int], list[str]]:
    """Places of `filename`, `identity` and the attributes by name, and the attributes' names in the file's order."""
    plain = [column.casefold() for column in header]
    if missing := [column for column in ("Filename", "Identity") if plain.count(column.casefold()) != 1]:
        raise UserError(f"{path}, line {line}: column {', '.join(missing)} is missing or there twice; found {header}")
    places = {column: plain.index(column) for column in ("filename", "identity")}
    others = [place for place, column in enumerate(header) if column and place not in places.values()]
    names = attributes.named(path, line, [header[place] for place in others], attributes.MAAD)
    return places | dict(zip(names, others, strict=True)), names


def _fields(text: str, count: int) -> list[str]:
    try:
        values = [part.strip() for part in next(csv.reader([text], strict=True))]
    except (csv.Error, StopIteration) as error:
        raise Refuse(f"not a row of comma-separated values ({error})") from None
    if len(values) != count:
        raise Refuse(f"{len(values)} fields where the header has {count}")
    return values


def _name(filename: str, identity: str) -> tuple[str, str]:
    """A picture's name, as n000002/0001_01.jpg, and its person. Raises Refuse when they contradict each other."""
    name = labels.inside(Path(), filename).as_posix()
    person, _, rest = name.partition("/")
    if not _PERSON.fullmatch(person) or not rest or "/" in rest:
        raise Refuse(f"Filename {filename!r} is no person's picture, as n000002/0001_01.jpg")
    number = identity.removeprefix("n")
    if not (number.isascii() and number.isdecimal() and len(number) <= 6 and int(number) == int(person[1:])):
        raise Refuse(f"Identity {identity!r} contradicts the {person} of Filename")
    return name, person


def _people(root: Path) -> tuple[dict[str, tuple[Path, str | None]], dict[str, list[str]]]:
    """Folder and split of each person, and the split folders of those who lie in several.

    Raises UserError when there is no person's folder at all.
    """
    people: dict[str, tuple[Path, str | None]] = {}
    twice: dict[str, list[str]] = {}
    for base in _BASES:
        for part, split in _SPLITS.items():
            place = root / base / part
            for person in filter(_PERSON.fullmatch, folders(place) if place.is_dir() else ()):
                if person in people:
                    first = people[person][0].parent.relative_to(root).as_posix()
                    twice.setdefault(person, [first]).append(place.relative_to(root).as_posix())
                else:
                    people[person] = place / person, split
    if not people:
        raise UserError(
            f"{root}: no person's folder (as n000002) here, in train/ or in test/; put VGGFace2's train and test here"
        )
    return people, twice
