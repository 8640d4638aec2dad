"""Pictures of your own: any tree of pictures, with a table of what is known of them if you have one.

    labels.csv              optional; UTF-8, comma separated, with a header
    anna/one.jpg            pictures at any depth
    anna/two.png

Columns of `labels.csv`: `file`, the path relative to this folder, is the one that must be there; every other is
optional, and an empty cell means unknown:
  subject      who it is, any text; it is stored hashed, and nobody stands in two splits
  split        train, validation or test; where it is empty the split is drawn by person (by picture without `subject`);
               a split that no row names is carved out of the training rows in the same way
  age          years                     age_range    as 20-29 or 70+
  gender       female or male            expression   neutral, happiness, sadness, surprise, fear, disgust, anger,
  ethnicity    a word of yours                        contempt, or another word of yours
  skin_tone    Monk scale, 1 to 10       yaw, pitch, roll   degrees, signs as in 300W-LP
  box          "left top right bottom"   landmarks    "x y x y ...", both in pixels of the upright picture
  alt_text, caption   text without line breaks
  AU1 ... AU64 an action unit, 0 to 5    Smiling ...  an attribute of CelebA or MAAD-Face: 0/1, true/false, yes/no
An unknown column stops the import, with the name that was probably meant. Without a table every picture is read and
nothing is known of it.

A picture of several people has a row each, told apart by `box`; each is a face of its own, cropped to its box. Without
`subject` they are people of whom nothing else is known, and stand in one split.
Crop: pictures of one row are used as they are; with the option crop: box they are cropped to their box.
Refused: rows with a bad value, ragged or repeated rows, paths that lead out of the folder, pictures that the table does
not name, files that are no pictures by their name, links to folders that `ingest.links` does not allow. Hidden files
and folders are passed over. What a picture is, its content says.
`source_id` is the path without its ending, and `/0`, `/1`, ... where it has several rows; a second picture of that name
keeps its ending.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from facemllm import tables
from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.labels import ATTRIBUTES
from facemllm.ingest.reader import (
    FOREIGN,
    PICTURES,
    Face,
    Reader,
    Refuse,
    Refused,
    allowed,
    composed,
    faces,
    listing,
    snake,
    walk,
)
from facemllm.tables import SPLITS

LABELS = "labels.csv"
NUMBERS = {label.name: label.limits for label in tables.LABELS if label.limits}
TEXTS = tuple(label.name for label in tables.LABELS if label.cell == "text")
WORDS = tuple(label.name for label in tables.LABELS if label.cell == "word")
OTHERS = ("file", "subject", "split", "gender", "age_range", "box", "landmarks")
COLUMNS = (*OTHERS, *TEXTS, *WORDS, *NUMBERS, *ATTRIBUTES)
"""Every column but the action units."""

GENDERS = ("female", "male")
TRUTH = {**dict.fromkeys(("1", "1.0", "true", "yes"), True), **dict.fromkeys(("0", "0.0", "false", "no"), False)}
_EXPRESSIONS = {"happy": "happiness", "sad": "sadness", "surprised": "surprise", "angry": "anger", "fearful": "fear"}
_EXPRESSIONS |= {"disgusted": "disgust", "scared": "fear", "afraid": "fear", "contemptuous": "contempt"}
_MEANT = {
    "file": ("filename", "file_name", "filepath", "path", "image", "image_path", "img", "name"),
    "subject": ("person", "identity", "id", "subject_id", "person_id"),
    "expression": ("emotion",),
    "gender": ("sex",),
    "ethnicity": ("race",),
    "box": ("bbox",),
    "split": ("set", "partition"),
    "caption": ("description", "text"),
}
_UNIT = re.compile(r"AU([1-9]|[1-5]\d|6[0-4])")
_NO_PICTURE = f"not a picture by its name ({', '.join(PICTURES)})"
_NOTHING = ("nan", "na", "n/a", "null", "none", "unknown", "?", "-")


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """Faces in the order of the table, or of the tree. Raises UserError when the table is not of the stated form, or
    there is no picture."""
    path = root / LABELS
    if not os.path.lexists(path):
        _check_misnamed(root)
        yield from _unknown(root)
        return
    if not path.is_file():
        raise UserError(f"{path}: not a file that can be read; put the table itself here")
    _check_header(labels.within(path, root))
    splits, several = _surveyed(path, root)
    named: dict[str, list[Any]] = {}
    names: dict[str, str] = {}
    taken: set[str] = set()

    def face(number: int, values: Mapping[str, str]) -> Face:
        picture = labels.inside(root, values["file"])
        file = picture.relative_to(root).as_posix()
        boxes, place = named.setdefault(file, []), len(named[file])
        boxes.append(None)
        facts = _parsed(values)
        box = facts.get("box")
        if box is None and file in several:
            raise Refuse(f"{file} has several rows, and this one no box; say in which part of the picture its face is")
        if place and (file not in several or box in boxes[:place]):
            raise Refuse(f"{file} has a row already")
        if box is None and options["crop"] == "box":
            raise Refuse("column box is empty, and the option crop: box needs it")
        boxes[place] = box
        split = _one_of("split", values["split"], SPLITS) if values.get("split") else None
        name = names[file] = names.get(file) or _name(file, taken)
        return Face(
            source_id=f"{name}/{place}" if file in several else name,
            image=picture,
            subject=values.get("subject") or None,
            split=split,
            crop=tuple(box) if box is not None and (file in several or options["crop"] == "box") else None,
            labels=facts,
            official=splits,
            photo=name if file in several else "",
        )

    empty = True
    for made in faces(labels.table(path, root, "file", part="box"), LABELS, face):
        empty = False
        yield made
    if empty:
        raise UserError(f"{path}: a header and no rows; write a row for every picture, or remove the file")
    forms = {composed(file) for file in named if not file.isascii()}
    for found in _tree(root):
        if isinstance(found, Refused):
            yield found
        elif found not in named and found != LABELS:
            reason = f"no row in {LABELS}" if _is_picture(found) else _NO_PICTURE
            if composed(found) in forms:
                reason += "; a file that has one is of the same name in another Unicode form: rename one of them"
            yield Refused(found, 0, reason)


READERS = {"imagefolder": Reader(read, {"crop": ("none", "box")}, SPLITS)}


def _surveyed(path: Path, root: Path) -> tuple[tuple[str, ...], set[str]]:
    """The splits that the table names anywhere (those that it never names are carved out of its training rows), and the
    pictures of several rows that boxes tell apart."""
    met, boxed, several, found = labels.Names(), labels.Names(), set[str](), set[str]()
    for row in labels.table(path, root, "file", part="box"):
        if isinstance(row, Refused):
            continue
        found.add(row[1].get("split", "").lower())
        with suppress(Refuse):
            file = labels.inside(root, row[1]["file"]).relative_to(root).as_posix()
            if row[1].get("box"):
                boxed.add(file)
            if not met.add(file) and file in boxed:
                several.add(file)
    return tuple(split for split in SPLITS if split in found), several


def _unknown(root: Path) -> Iterator[Face | Refused]:
    """Every picture of a tree without a table."""
    taken: set[str] = set()
    found = False
    for file in _tree(root):
        if isinstance(file, Refused):
            yield file
        elif not _is_picture(file):
            yield Refused(file, 0, _NO_PICTURE)
        else:
            found = True
            yield Face(source_id=_name(file, taken), image=root / file)
    if not found:
        raise UserError(f"{root}: no picture in it ({', '.join(PICTURES)}); give the folder that holds them")


def _name(file: str, taken: set[str]) -> str:
    """A picture's path without its ending, or with it where another has that name already."""
    file = composed(file)
    stem = PurePosixPath(file).with_suffix("").as_posix()
    name = file if stem in taken else stem
    taken.add(stem)
    return name


def _tree(root: Path) -> Iterator[str | Refused]:
    """Files under the root in order of their paths, folder by folder; hidden ones are passed over."""
    unread: list[OSError] = []
    for folder, links, files in walk(root, unread.append):
        inside = PurePosixPath(folder.relative_to(root).as_posix())
        for name in links:
            read_there = "; what is there is read there" if allowed(folder / name, root) else ""
            mend = read_there or "; put the folder itself here, or name where it leads in ingest.links"
            yield Refused((inside / name).as_posix(), 0, f"a link to a folder{mend}")
        for name in sorted(name for name in files if not name.startswith(".")):
            yield (inside / name).as_posix()
    for error in unread:
        place = Path(str(error.filename)).relative_to(root).as_posix()
        yield Refused(place, 0, f"the folder cannot be read: {error.strerror}")


def _is_picture(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in (*PICTURES, *FOREIGN)


def _check_misnamed(root: Path) -> None:
    """Labels that were meant and would be lost stop the import: Labels.csv, labels.csv.txt, label.xlsx, and a table in
    a folder further down."""
    tables = (".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods", ".json", ".jsonl", ".parquet")
    for name in listing(root):
        lower = name.lower()
        if lower.startswith("label") and lower.endswith(tables):
            raise UserError(f"{root / name}: labels are read from a file named {LABELS} (comma separated); rename it")
    for found in _tree(root):
        if isinstance(found, str) and PurePosixPath(found).name.lower() == LABELS:
            raise UserError(
                f"{root / found}: labels are read from {root / LABELS} alone; give {(root / found).parent} as the "
                f"folder, or put the table there, with `file` as in {PurePosixPath(found).parent}/one.jpg"
            )


def _check_header(path: Path) -> None:
    """Raises UserError when the first line is not the header of a table with known columns."""
    number, first = next(labels.lines(path), (1, ""))
    where = f"{path}, line {number}"
    if not first:
        raise UserError(f"{path}: empty; write a header (file,age,...) and a row for every picture, or remove it")
    if "," not in first and (sign := next((sign for sign in ";\t|" if sign in first), None)):
        raise UserError(f"{where}: columns are parted by {sign!r}; save the table with commas")
    header = labels.split_header(path, number, first)
    for place, name in enumerate(header, start=1):
        if not name or name.startswith("Unnamed:"):
            raise UserError(f"{where}: column {place} has no name; name it or save the table without its index")
        if name not in COLUMNS and not _UNIT.fullmatch(name):
            raise UserError(f"{where}: no column is called '{name}'{_suggestion(name, header)}")
    if "file" not in header:
        raise UserError(f"{where}: column file is missing; it holds the path of each picture, as in anna/one.jpg")


def _parsed(values: Mapping[str, str]) -> dict[str, Any]:
    """The labels in the cells of a row. Raises Refuse naming the column that is wrong."""
    found: dict[str, Any] = {}
    attributes: dict[str, bool] = {}
    units: dict[str, float] = {}
    for name, cell in values.items():
        if not cell or name in ("file", "subject", "split"):
            continue
        if cell.lower() in _NOTHING and name not in TEXTS:
            raise Refuse(f"column {name} is {cell!r}; leave the cell empty where it is unknown")
        if name in ATTRIBUTES:
            attributes[name] = _truth(name, cell)
        elif _UNIT.fullmatch(name):
            units[name] = labels.number(cell, f"column {name}", 0, 5)
        else:
            found[name] = _value(name, cell)
    if attributes:
        found["attributes"] = attributes
    if units:
        found["action_units"] = units
    return found


def _value(name: str, cell: str) -> Any:
    if name in NUMBERS:
        number = labels.number(cell, f"column {name}", *NUMBERS[name])
        if not pa.types.is_integer(tables.FACES.field(name).type):
            return number
        if number != int(number):
            raise Refuse(f"column {name} is {cell}, not a whole number")
        return int(number)
    if name in TEXTS:
        return cell
    if name == "gender":
        return _one_of(name, cell, GENDERS)
    if name == "age_range":
        return _age_range(cell)
    if name in ("box", "landmarks"):
        return _pixels(name, cell)
    return _word(name, cell)


def _suggestion(name: str, header: list[str]) -> str:
    plain = re.sub(r"[\s-]+", "_", name).lower()
    if unit := re.fullmatch(r"au_?0*(\d+)(_r|_c)?", plain):
        return f"; action units are AU1 to AU64: did you mean 'AU{unit[1]}'?"
    known = {column.lower(): column for column in COLUMNS}
    meant = known.get(plain) or next((column for column, names in _MEANT.items() if plain in names), None)
    close = [meant] if meant else [known[match] for match in get_close_matches(plain, known, n=1, cutoff=0.75)]
    if close and close[0] not in header:
        return f"; did you mean '{close[0]}'?"
    return f"; there are {', '.join((*OTHERS, *TEXTS, *WORDS, *NUMBERS))}, AU1 to AU64, and attributes as Smiling"


def _truth(name: str, cell: str) -> bool:
    if cell.lower() not in TRUTH:
        raise Refuse(f"column {name} is {cell!r}, not 0 or 1 (true, false, yes, no; empty: unknown)")
    return TRUTH[cell.lower()]


def _one_of(name: str, cell: str, known: tuple[str, ...]) -> str:
    if cell.lower() not in known:
        raise Refuse(f"column {name} is {cell!r}, not one of {', '.join(known)}")
    return cell.lower()


def _word(name: str, cell: str) -> str:
    word = snake(cell)
    if not re.fullmatch(r"[^\W\d_]\w{0,63}", word):
        raise Refuse(f"column {name} is {cell[:40]!r}, not a word")
    if name == "expression" and word in _EXPRESSIONS:
        raise Refuse(f"column expression is {cell!r}; write {_EXPRESSIONS[word]}")
    return word


def _age_range(cell: str) -> str:
    ends = re.fullmatch(r"(\d{1,3})\s*(?:-\s*(\d{1,3})|\+)", cell, re.ASCII)
    if ends is None or (ends[2] and int(ends[1]) > int(ends[2])):
        raise Refuse(f"column age_range is {cell!r}, not a range as 20-29 or 70+")
    return f"{int(ends[1])}-{int(ends[2])}" if ends[2] else f"{int(ends[1])}+"


def _pixels(name: str, cell: str) -> list[float] | list[list[float]]:
    """Numbers of a cell, with or without brackets and commas: a box of four, or points."""
    parts = re.sub(r"[\[\](),;]", " ", cell).split()
    numbers = [labels.number(part, f"column {name}") for part in parts]
    if name == "landmarks":
        if not numbers or len(numbers) % 2:
            raise Refuse(f"column landmarks has {len(numbers)} numbers; points are pairs, as in '30 40 70 40'")
        return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    if len(numbers) != 4:
        raise Refuse(f"column box has {len(numbers)} numbers, not four: left top right bottom")
    if numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        raise Refuse(f"column box is {cell!r}: left top right bottom, so right exceeds left and bottom exceeds top")
    return numbers
