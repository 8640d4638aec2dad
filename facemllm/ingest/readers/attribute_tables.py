"""LFWA and MAAD-Face: forty to seventy-three yes-or-no attributes of faces of known people, in one table each.

LFWA: the 13,143 pictures of Labeled Faces in the Wild that have 40 (LFWA) or 73 attributes (option `attributes`).

    lfw/Aaron_Eckhart/Aaron_Eckhart_0001.jpg    also lfw-funneled/, lfw_funneled/, lfw-deepfunneled/, doubly nested
    lfw_att_40.mat, lfw_att_73.mat              AttrName, label, name
    indices_train_test.mat                      indices_img_train, indices_img_test: places in `name`, from 1

The .mat files are MATLAB v7.3, that is HDF5: a cell array holds references to texts of 16-bit characters, a matrix lies
transposed. `label` (pictures x attributes) is 0/1, taken as 1/-1 too; `name` has backslashes.

Subject: the folder. Splits: the official train and test, by the indices. Crop: none; pictures as they are, 250 x 250,
with the head well inside. `Male` also gives gender, as annotated. The 73 names are spelled as in CelebA and MAAD-Face
where these have them; how the 73 file spells them, and whether labels are 0/1, is unverified.

Refused (the row is the place in `name`, from 1): a value that is neither of the file's two, a name that is no text, is
there twice, leads elsewhere or contradicts its folder, a picture in neither or both of the indices, an index beyond the
pictures, a picture without a label row. A file that is no v7.3 file, lacks a variable, or points into other files is an
error.

Source: Liu et al., Deep Learning Face Attributes in the Wild, ICCV 2015; Huang et al., Labeled Faces in the Wild, 2007.

MAAD-Face: 47 attributes for the 3.3 million pictures of VGGFace2.

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

import re
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.errors import UserError, one_line
from facemllm.ingest import labels
from facemllm.ingest.reader import Face, Reader, Refuse, Refused, faces, folder, folders, unlabelled_pictures
from facemllm.tables.schemas import CELEBA

_FOLDERS = ("lfw", "lfw-funneled", "lfw_funneled", "lfw-deepfunneled", "lfw_deepfunneled")
_INDICES = "indices_train_test.mat"
_MOST = 10_000_000  # entries of a matrix; the release has 959,439
_LONGEST = 1000  # characters of a text


def read_lfwa(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """One face a place in `name`, in its order, then the pictures that it does not name.

    Raises UserError when a file or the folder of pictures is missing or has not the stated form.
    """
    place = folder(root, *_FOLDERS)
    file = f"lfw_att_{options['attributes']}.mat"
    names, texts, values = lfwa_labels(labels.existing(root, file), int(options["attributes"]))
    splits = yield from _lfwa_splits(labels.existing(root, _INDICES), len(texts))
    coding, labelled = labels.Coding(), labels.Names()

    def face(number: int, labelled_as: tuple[str | None, NDArray[np.float64]]) -> Face:
        text, row = labelled_as
        if text is None:
            raise Refuse("its name is no text")
        path = labels.inside(place, text)
        if not labelled.add(path.relative_to(root).as_posix()):
            raise Refuse(f"{path.name} has a row already")
        if path.parent.parent != place or not path.name.startswith(f"{path.parent.name}_"):
            raise Refuse(f"{text} is no picture of a person, as Aaron_Eckhart\\Aaron_Eckhart_0001.jpg")
        found = labels.attribute_columns(coding.truths(names, [_written(value) for value in row]))
        if len(splits[number - 1]) != 1:
            raise Refuse(f"{path.name} is in {' and '.join(splits[number - 1]) or 'neither split'} of {_INDICES}")
        return Face(
            source_id=path.stem, image=path, subject=path.parent.name, split=splits[number - 1][0], labels=found
        )

    yield from faces(enumerate(zip(texts, values, strict=True), start=1), file, face)
    for person in folders(place):
        yield from unlabelled_pictures(root, place / person, labelled)


def _written(value: float) -> str:
    return str(int(value)) if value in (-1, 0, 1) else str(value)


def lfwa_labels(path: Path, count: int) -> tuple[list[str], list[str | None], NDArray[np.float64]]:
    """Attribute names, picture names (None: no text) and values (pictures, attributes) of an attribute file."""
    with _opened(path) as file:
        found = [text or "" for text in _texts(file, path, "AttrName")]
        names = [labels.spelled(name) for name in found]
        if count == len(CELEBA):
            names = labels.attribute_names(path, 0, found, CELEBA)
        elif len(set(names)) != count:
            raise UserError(f"{path}: AttrName has {len(set(names))} different names; {count} were expected")
        texts = _texts(file, path, "name")
        values = _numbers(file, path, "label")
    if values.shape != (len(names), len(texts)):
        raise UserError(
            f"{path}: label is {' x '.join(map(str, values.shape))} on disk; {len(names)} x {len(texts)} were expected"
        )
    return names, texts, values.T


def _lfwa_splits(path: Path, count: int) -> Generator[Refused, None, list[list[str]]]:
    """Returns the splits that name each place; yields the indices that are none of 1 to `count`."""
    splits: list[list[str]] = [[] for _ in range(count)]
    with _opened(path) as file:
        for split in ("train", "test"):
            key = f"indices_img_{split}"
            for place, index in enumerate(_numbers(file, path, key).ravel(), start=1):
                if index != index // 1 or not 1 <= index <= count:
                    yield Refused(path.name, place, f"{key} has {index:g}; 1 to {count} were expected")
                elif split not in splits[int(index) - 1]:
                    splits[int(index) - 1].append(split)
    return splits


def _opened(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError:
        raise UserError(
            f"{path}: no MATLAB v7.3 file (HDF5); take the file of the release, or save it with -v7.3"
        ) from None


def _variable(file: Any, path: Path, key: str, kinds: str) -> Any:
    """A variable of a file, entries of one of these kinds. Raises UserError when it is not in this very file."""
    import h5py

    if not isinstance(file.get(key, getlink=True), h5py.HardLink) or not isinstance(file[key], h5py.Dataset):
        raise UserError(f"{path}: variable {key} is missing; found {', '.join(sorted(set(file) - {'#refs#'}))}")
    found = file[key]
    if found.is_virtual or found.external or found.dtype.kind not in kinds or found.size > _MOST:
        raise UserError(f"{path}: variable {key} ({found.dtype}, {found.size} entries) is not what LFWA has there")
    return found


def _numbers(file: Any, path: Path, key: str) -> NDArray[np.float64]:
    return np.asarray(_values(_variable(file, path, key, "fbiu"), path, key), np.float64)


def _values(variable: Any, path: Path, key: str) -> Any:
    try:
        return variable[()]
    except OSError as error:
        raise UserError(f"{path}: variable {key} is damaged ({one_line(error)})") from None


def _texts(file: Any, path: Path, key: str) -> list[str | None]:
    """The texts of a cell array; None for a cell that holds none."""
    import h5py

    cells = _variable(file, path, key, "O")
    if h5py.check_ref_dtype(cells.dtype) is not h5py.Reference:
        raise UserError(f"{path}: variable {key} is no cell array of texts")
    return [_text(file, cell) for cell in _values(cells, path, key).ravel()]


def _text(file: Any, reference: Any) -> str | None:
    try:
        cell = file[reference]
        if cell.dtype != np.uint16 or cell.external or cell.is_virtual or not 0 < cell.size <= _LONGEST:
            return None
        text: str = np.asarray(cell[()], "<u2").T.tobytes().decode("utf-16-le")
    except (OSError, ValueError, KeyError, AttributeError):  # a null or dangling reference, a group, half a character
        return None
    return text


_PERSON = re.compile(r"n\d{6}", re.ASCII)
_MAAD_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test", "": None}
_BASES = ("", "data", "VGGFace2")


def read_maad_face(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """One face a row of MAAD_Face.csv, in its order, then the pictures that it does not name.

    Raises UserError when the file or the persons' folders are missing, or a column is missing or unknown.
    """
    path = labels.existing(root, "MAAD_Face.csv", "maad/MAAD_Face.csv", "MAAD-Face/MAAD_Face.csv")
    people, twice = _vggface2_people(root)
    numbered = labels.lines(path)
    line, first = next(numbered, (1, ""))
    header = labels.split_header(path, line, first)
    places, names = _maad_columns(path, line, header)
    seen, labelled = labels.Names(), labels.Names()

    def face(line: int, text: str) -> Face:
        values = labels.fields(text, len(header))
        name, person = _maad_name(values[places["filename"]], values[places["identity"]])
        if not seen.add(name):
            raise Refuse(f"{name} has a row already")
        folder, split = people.get(person, (root / person, None))
        picture = labels.inside(folder, name.rpartition("/")[2])
        place = picture.relative_to(root).as_posix()
        labelled.add(place)
        if person in twice:
            raise Refuse(f"{person} lies in {' and '.join(twice[person])}; a person is in one split only")
        found = labels.attribute_columns(labels.known_truths(names, [values[places[name]] for name in names]))
        own = f"{person}/{picture.stem}"
        return Face(source_id=own, image=picture, subject=person, split=split, labels=found)

    yield from faces(numbered, path.relative_to(root).as_posix(), face)
    for place, _ in people.values():
        yield from unlabelled_pictures(root, place, labelled)


def _maad_columns(path: Path, line: int, header: list[str]) -> tuple[dict[str, int], list[str]]:
    """Places of `filename`, `identity` and the attributes by name, and the attributes' names in the file's order."""
    plain = [column.casefold() for column in header]
    if missing := [column for column in ("Filename", "Identity") if plain.count(column.casefold()) != 1]:
        raise UserError(f"{path}, line {line}: column {', '.join(missing)} is missing or there twice; found {header}")
    places = {column: plain.index(column) for column in ("filename", "identity")}
    others = [place for place, column in enumerate(header) if column and place not in places.values()]
    names = labels.attribute_names(path, line, [header[place] for place in others], labels.MAAD)
    return places | dict(zip(names, others, strict=True)), names


def _maad_name(filename: str, identity: str) -> tuple[str, str]:
    """A picture's name, as n000002/0001_01.jpg, and its person. Raises Refuse when they contradict each other."""
    name = labels.inside(Path(), filename).as_posix()
    person, _, rest = name.partition("/")
    if not _PERSON.fullmatch(person) or not rest or "/" in rest:
        raise Refuse(f"Filename {filename!r} is no person's picture, as n000002/0001_01.jpg")
    number = identity.removeprefix("n")
    if not (number.isascii() and number.isdecimal() and len(number) <= 6 and int(number) == int(person[1:])):
        raise Refuse(f"Identity {identity!r} contradicts the {person} of Filename")
    return name, person


def _vggface2_people(root: Path) -> tuple[dict[str, tuple[Path, str | None]], dict[str, list[str]]]:
    """Folder and split of each person, and the split folders of those who lie in several.

    Raises UserError when there is no person's folder at all.
    """
    people: dict[str, tuple[Path, str | None]] = {}
    twice: dict[str, list[str]] = {}
    for base in _BASES:
        for part, split in _MAAD_SPLITS.items():
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


READERS = {
    "lfwa": Reader(read_lfwa, {"attributes": ("40", "73")}, ("train", "test")),
    "maad-face": Reader(read_maad_face, official=("train", "test")),
}
