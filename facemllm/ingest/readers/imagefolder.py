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

Crop: pictures are used as they are; with the option crop: box they are cropped to their box.
Refused: rows with a bad value, ragged or repeated rows, paths that lead out of the folder, pictures that the table does
not name, files that are no pictures by their name (.jpg .jpeg .jpe .jfif .png .webp .bmp), links to folders. Hidden
files and folders are passed over. What a picture is, its content says.
`source_id` is the path without its ending; a second picture of that name keeps its ending.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Box, Face, Refuse, Refused
from facemllm.ingest.readers.columns import Row, check_header, parsed
from facemllm.ingest.readers.files import PICTURES, listing
from facemllm.tables import SPLITS

KEY = "imagefolder"
OPTIONS = {"crop": ("none", "box")}
OFFICIAL = SPLITS

LABELS = "labels.csv"


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
    check_header(labels.within(path, root))
    splits = _splits_named(path, root)
    named: set[str] = set()
    taken: set[str] = set()
    count = 0
    for row in labels.table(path, root, "file"):
        count += 1
        if isinstance(row, Refused):
            yield row
            continue
        number, values = row
        try:
            picture = labels.inside(root, values["file"])
            file = picture.relative_to(root).as_posix()
            if file in named:
                raise Refuse(f"{file} has a row already")
            named.add(file)
            yield replace(_face(file, picture, number, parsed(values), taken, options["crop"]), official=splits)
        except Refuse as error:
            yield Refused(LABELS, number, str(error))
    if not count:
        raise UserError(f"{path}: a header and no rows; write a row for every picture, or remove the file")
    for found in _tree(root):
        if isinstance(found, Refused):
            yield found
        elif found not in named and found != LABELS:
            yield Refused(found, 0, f"no row in {LABELS}" if _is_picture(found) else _NO_PICTURE)


_NO_PICTURE = f"not a picture by its name ({', '.join(PICTURES)})"


def _splits_named(path: Path, root: Path) -> tuple[str, ...]:
    """The splits that the table names anywhere; those that it never names are carved out of its training rows."""
    rows = (row for row in labels.table(path, root, "file") if not isinstance(row, Refused))
    found = {values.get("split", "").lower() for _, values in rows}
    return tuple(split for split in SPLITS if split in found)


def _face(file: str, picture: Path, number: int, row: Row, taken: set[str], crop: str) -> Face:
    frame: Box | None = None
    if crop == "box":
        if "box" not in row.labels:
            raise Refuse("column box is empty, and the option crop: box needs it")
        left, top, right, bottom = row.labels["box"]
        frame = (left, top, right, bottom)
    return Face(
        file=file,
        row=number,
        source_id=_name(file, taken),
        image=picture,
        subject=row.subject,
        split=row.split,
        crop=frame,
        labels=row.labels,
    )


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
            yield Face(file=file, source_id=_name(file, taken), image=root / file)
    if not found:
        raise UserError(f"{root}: no picture in it ({', '.join(PICTURES)}); give the folder that holds them")


def _name(file: str, taken: set[str]) -> str:
    stem = PurePosixPath(file).with_suffix("").as_posix()
    name = file if stem in taken else stem
    taken.add(stem)
    return name


def _tree(root: Path) -> Iterator[str | Refused]:
    """Files under the root in order of their paths, folder by folder; hidden ones are passed over."""
    unread: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=unread.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                yield Refused((inside / name).as_posix(), 0, "a link to a folder; put the folder itself here")
        for name in sorted(name for name in files if not name.startswith(".")):
            yield (inside / name).as_posix()
    for error in unread:
        place = Path(str(error.filename)).relative_to(root).as_posix()
        yield Refused(place, 0, f"the folder cannot be read: {error.strerror}")


def _is_picture(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in PICTURES


def _check_misnamed(root: Path) -> None:
    """Labels that were meant and would be lost stop the import: Labels.csv, labels.csv.txt, label.xlsx."""
    tables = (".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods", ".json", ".jsonl", ".parquet")
    for name in listing(root):
        lower = name.lower()
        if lower.startswith("label") and lower.endswith(tables):
            raise UserError(f"{root / name}: labels are read from a file named {LABELS} (comma separated); rename it")
