"""CelebA: 202,599 pictures of some 10,000 celebrities with 40 attributes.

    Img/img_align_celeba/000001.jpg        or img_align_celeba/, also doubly nested as a CSV re-pack leaves it
    Img/img_celeba/000001.jpg              or img_celeba/, for `pictures: wild`
    Anno/list_attr_celeba.txt              count, 40 names, then `000001.jpg -1  1 ...` with runs of blanks
    Anno/identity_CelebA.txt               optional, `000001.jpg 2880`: subjects
    Anno/list_landmarks_align_celeba.txt   optional, five points; list_landmarks_celeba.txt for `wild`
    Anno/list_bbox_celeba.txt              for `wild`: x_1 y_1 width height
    Eval/list_eval_partition.txt           `000001.jpg 0`: 0 train, 1 validation, 2 test

Label files may lie in Anno/, in Eval/ or right in the root, as .txt or, but for identities, as .csv with `image_id`.
Attributes are -1/1 or 0/1, never both in a file.

Crop: `pictures: aligned` takes the aligned pictures as they are (178 x 218 in the release); `wild` crops the pictures
to list_bbox_celeba, which refers to the wild ones only. Landmarks are eyes, nose and mouth corners, "left" being the
image's left. `Male` also gives gender, as annotated.

Refused: ragged and duplicate rows, a value that is neither of the file's two, a picture without a split or (wild)
without a box of positive size, a partition row of a picture without attributes, a picture without a label row, a wrong
count in line 1. A damaged row of an optional file is refused alone: the face stays, without what it would have said.

Source: Liu et al., Deep Learning Face Attributes in the Wild, ICCV 2015, and torchvision's `CelebA`; that left is the
image's left is our reading of the published points, the size of aligned pictures is prior knowledge.

Label files are text with a count and names on top, bare pairs, or CSV; rows stream, see `Beside` for how a second file
is joined to the first without being held. CelebAMask-HQ shares them.

    202599                                    image_id,5_o_Clock_Shadow,...      000001.jpg 0
    5_o_Clock_Shadow Arched_Eyebrows ...      000001.jpg,-1,...                  000002.jpg 2
    000001.jpg -1  1 ...                      (CSV re-pack)                      (no header: partition, identity)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from facemllm.errors import UserError
from facemllm.ingest import labels
from facemllm.ingest.reader import Box, Face, Reader, Refuse, Refused, folder, unlabelled_pictures
from facemllm.tables.schemas import CELEBA

Value = TypeVar("Value")
Entry = tuple[int, str, list[str]]
"""Line number, name of the picture, the values after it."""

PARTITION = "list_eval_partition"
SPLITS = {"0": "train", "1": "validation", "2": "test"}
_KEY = "image_id"
_FOLDERS = ("", "Anno", "Eval")
POINTS = tuple(f"{part}_{axis}" for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy")
BOX = ("x_1", "y_1", "width", "height")
_FAR = 100_000  # pixels; no picture that is read is as wide


def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
    """One face a row of list_attr_celeba, in its order, then what is left over.

    Raises UserError when a label file or the folder of pictures is missing or has not the stated form.
    """
    wild = options["pictures"] == "wild"
    base = "img_celeba" if wild else "img_align_celeba"
    place = folder(root, f"Img/{base}", base)
    inside = place.relative_to(root).as_posix()
    main = sheet(needed(root, "list_attr_celeba"), root)
    names = labels.attribute_names(main.path, main.line, main.columns, CELEBA)
    others = _others(root, wild)
    required = ("split", "box") if wild else ("split",)
    coding, labelled = labels.Coding(), labels.Names()
    for row in main.rows:
        if isinstance(row, Refused):
            yield row
            continue
        line, name, values = row
        labelled.add(f"{inside}/{name}")
        found = {key: other.find(name) for key, other in others.items()}
        for other in others.values():
            yield from other.refused()
        damaged = {key: value for key, value in found.items() if isinstance(value, Refused)}
        yield from damaged.values()
        if any(key in damaged for key in required):
            continue
        given: dict[str, Any] = {key: value for key, value in found.items() if value is not None and key not in damaged}
        try:
            path = labels.inside(place, name)
            columns = labels.attribute_columns(coding.truths(names, values))
            if missing := [others[key].name for key in required if key not in given]:
                raise Refuse(f"{name} has no row in {' and '.join(missing)}")
        except Refuse as error:
            yield Refused(main.name, line, str(error))
            continue
        columns |= {key: given[key] for key in ("landmarks", "box") if key in given}
        known = {"subject": given.get("subject"), "split": given["split"], "crop": given.get("box")}
        yield Face(row=line, source_id=path.stem, image=path, labels=columns, **known)
    for key, other in others.items():
        for left in other.rest():
            if isinstance(left, Refused):
                yield left
            elif key == "split":
                yield Refused(other.name, left[0], f"{left[1]} has no usable row in {main.name}")
    yield from unlabelled_pictures(root, place, labelled)


READERS = {"celeba": Reader(read, {"pictures": ("aligned", "wild")}, ("train", "validation", "test"))}


def _others(root: Path, wild: bool) -> dict[str, Beside[Any]]:
    """The files beside the attributes, by what they give. Raises UserError when one that is needed is missing."""
    found: dict[str, Beside[Any]] = {"split": Beside(pairs(needed(root, PARTITION), root, "partition"), split)}
    if persons := subjects(root, root):
        found["subject"] = persons
    if path := find(root, "list_landmarks_celeba" if wild else "list_landmarks_align_celeba"):
        found["landmarks"] = Beside(sheet(path, root, POINTS), _points)
    if wild:
        found["box"] = Beside(sheet(needed(root, "list_bbox_celeba"), root, BOX), _box)
    return found


def _points(row: Mapping[str, str]) -> list[list[float]]:
    """The five points (x, y), in the order of `POINTS`. Raises Refuse when one is no number of pixels."""
    flat = [labels.number(row[name], name, -_FAR, _FAR) for name in POINTS]
    return [[x, y] for x, y in zip(flat[::2], flat[1::2], strict=True)]


def _box(row: Mapping[str, str]) -> Box:
    """left, top, right, bottom. Raises Refuse when the box has no area."""
    left, top = (labels.number(row[name], name, -_FAR, _FAR) for name in BOX[:2])
    width, height = (labels.number(row[name], name, 1, _FAR) for name in BOX[2:])
    return left, top, left + width, top + height


def find(root: Path, name: str, suffixes: tuple[str, ...] = (".txt", ".csv")) -> Path | None:
    """A label file by its name without suffix: right in `root`, in Anno/ or Eval/; None if absent."""
    places = (root / folder / f"{name}{suffix}" for folder in _FOLDERS for suffix in suffixes)
    return next((place for place in places if place.is_file()), None)


def needed(root: Path, name: str) -> Path:
    """`find`, but raises UserError when the file is absent."""
    if (found := find(root, name)) is None:
        raise UserError(f"{root}: {name}.txt (or .csv) is missing here and in Anno/ and Eval/; put it there")
    return found


@dataclass(frozen=True)
class Sheet:
    """A label file: its name relative to the root, its columns after the picture's name, the line they stand on, and
    its rows."""

    path: Path
    name: str
    columns: tuple[str, ...]
    line: int
    rows: Iterable[Entry | Refused]


def sheet(path: Path, root: Path, expected: Sequence[str] = ()) -> Sheet:
    """A label file that names its columns: a count and names on top, or CSV with `image_id`.

    Its rows end with a `Refused` for line 1 when the count there is wrong. Raises UserError when the top is not so, or
    the columns are not the expected ones (in any order).
    """
    name = path.relative_to(root).as_posix()
    top = list(islice(labels.lines(path), 2))
    if path.suffix == ".csv":
        header = labels.split_header(path, 1, top[0][1]) if top else []
        columns = tuple(column for column in header if column != _KEY)
        found = Sheet(path, name, columns, 1, _comma_separated(path, root, columns))
    elif len(top) < 2 or not top[0][1].strip().isdecimal():
        raise UserError(f"{path}: expected the number of rows on its first line and the columns' names on its second")
    else:
        columns = tuple(top[1][1].split())
        columns = columns[columns[:1] == (_KEY,) :]
        found = Sheet(path, name, columns, top[1][0], _counted(path, root, len(columns), top[0], top[1][0]))
    if expected and sorted(columns) != sorted(expected):
        listed = " ".join(columns) or "(none)"
        raise UserError(f"{path}, line {found.line}: columns {listed}; expected {' '.join(expected)}")
    return found


def pairs(path: Path, root: Path, column: str) -> Sheet:
    """A label file of one value a picture: text without header, or CSV with `image_id` and a column of this name.

    Raises UserError when a CSV has not these columns.
    """
    if path.suffix == ".csv":
        return sheet(path, root, (column,))
    return Sheet(path, path.relative_to(root).as_posix(), (column,), 0, _entries(path, root, 1))


def _comma_separated(path: Path, root: Path, columns: tuple[str, ...]) -> Iterator[Entry | Refused]:
    for row in labels.table(path, root, _KEY, columns):
        yield row if isinstance(row, Refused) else (row[0], row[1][_KEY], [row[1][column] for column in columns])


def _entries(path: Path, root: Path, width: int, skip: int = 0) -> Iterator[Entry | Refused]:
    for row in labels.words(path, root, 1 + width, skip=skip):
        yield row if isinstance(row, Refused) else (row[0], row[1][0], row[1][1:])


def _counted(path: Path, root: Path, width: int, count: tuple[int, str], skip: int) -> Iterator[Entry | Refused]:
    read = 0
    for row in _entries(path, root, width, skip):
        read += 1
        yield row
    if read != int(count[1]):
        reason = f"says {count[1].strip()} rows, {read} follow; the file may be cut off"
        yield Refused(path.relative_to(root).as_posix(), count[0], reason)


class Beside(Generic[Value]):
    """Rows of a second label file, found by the picture's name and made into a value by `parse` (column -> text).

    The files of a release list the pictures in one order: this one is read on until the name turns up, so nothing is
    held. Rows that are passed over are kept until they are asked for.
    """

    def __init__(self, sheet: Sheet, parse: Callable[[Mapping[str, str]], Value]) -> None:
        self.name = sheet.name
        self._columns = sheet.columns
        self._parse = parse
        self._rows = iter(sheet.rows)
        self._passed: dict[str, tuple[int, list[str]]] = {}
        self._refused: list[Refused] = []

    def find(self, name: str) -> Value | Refused | None:
        """What a picture's row says, `Refused` when that is damaged, None when it has none; to be asked once."""
        line, values = self._passed.pop(name) if name in self._passed else self._read_to(name)
        return self._parsed(line, name, values) if line else None

    def only(self, wanted: Container[str]) -> Iterator[tuple[str, Value] | Refused]:
        """Names and values of the wanted pictures' rows, in the file's order; instead of `find`, not besides."""
        for row in self._rows:
            if isinstance(row, Refused):
                yield row
            elif row[1] in wanted:
                value = self._parsed(*row)
                yield value if isinstance(value, Refused) else (row[1], value)

    def _parsed(self, line: int, name: str, values: list[str]) -> Value | Refused:
        try:
            return self._parse(dict(zip(self._columns, values, strict=True)))
        except Refuse as error:
            return Refused(self.name, line, f"{name}: {error}")

    def _read_to(self, name: str) -> tuple[int, list[str]]:
        for row in self._rows:
            if isinstance(row, Refused):
                self._refused.append(row)
            elif row[1] == name:
                return row[0], row[2]
            else:
                self._passed[row[1]] = row[0], row[2]
        return 0, []

    def refused(self) -> Iterator[Refused]:
        """The rows refused since this was last asked."""
        yield from self._refused
        self._refused = []

    def rest(self) -> Iterator[tuple[int, str] | Refused]:
        """Reads the file to its end: refused rows, and line and name of those that were never asked for."""
        yield from self.refused()
        for name, (line, _) in self._passed.items():
            yield line, name
        for row in self._rows:
            yield row if isinstance(row, Refused) else row[:2]


def split(row: Mapping[str, str]) -> str:
    """The split that a row of the partition names. Raises Refuse when it is none of `SPLITS`."""
    if row["partition"] not in SPLITS:
        raise Refuse(f"partition is {row['partition']!r}, not 0, 1 or 2")
    return SPLITS[row["partition"]]


def subjects(root: Path, base: Path) -> Beside[str] | None:
    """The persons of identity_CelebA.txt under `root` (paths relative to `base`); None when it is not there.

    CSV copies of it are not read: they have no common header.
    """
    path = find(root, "identity_CelebA", (".txt",))
    return Beside(pairs(path, base, "identity"), _only) if path else None


def _only(row: Mapping[str, str]) -> str:
    """The one value of a row. Raises Refuse when it is empty."""
    (value,) = row.values()
    if not value:
        raise Refuse("the value is empty")
    return value
