"""The label files of CelebA, which CelebAMask-HQ shares: text with a count and names on top, bare pairs, or CSV.

    202599                                    image_id,5_o_Clock_Shadow,...      000001.jpg 0
    5_o_Clock_Shadow Arched_Eyebrows ...      000001.jpg,-1,...                  000002.jpg 2
    000001.jpg -1  1 ...                      (CSV re-pack)                      (no header: partition, identity)

Rows stream; see `Beside` for how a second file is joined to the first without being held.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from facemllm.errors import UserError
from facemllm.ingest.labels import lines, table, words
from facemllm.ingest.reader import Refuse, Refused

Value = TypeVar("Value")
Entry = tuple[int, str, list[str]]
"""Line number, name of the picture, the values after it."""

PARTITION = "list_eval_partition"
SPLITS = {"0": "train", "1": "validation", "2": "test"}
_KEY = "image_id"
_FOLDERS = ("", "Anno", "Eval")


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
    found = _opened(path, root)
    if expected and sorted(found.columns) != sorted(expected):
        raise UserError(
            f"{path}, line {found.line}: columns {' '.join(found.columns) or '(none)'}; expected {' '.join(expected)}"
        )
    return found


def _opened(path: Path, root: Path) -> Sheet:
    name = path.relative_to(root).as_posix()
    top = list(islice(lines(path), 2))
    if path.suffix == ".csv":
        header = [part.strip() for part in next(csv.reader([top[0][1]]), [])] if top else []
        columns = tuple(column for column in header if column != _KEY)
        return Sheet(path, name, columns, 1, _comma_separated(path, root, columns))
    if len(top) < 2 or not top[0][1].strip().isdecimal():
        raise UserError(f"{path}: expected the number of rows on its first line and the columns' names on its second")
    columns = tuple(top[1][1].split())
    columns = columns[columns[:1] == (_KEY,) :]
    return Sheet(path, name, columns, top[1][0], _counted(path, root, len(columns), top[0], top[1][0]))


def pairs(path: Path, root: Path, column: str) -> Sheet:
    """A label file of one value a picture: text without header, or CSV with `image_id` and a column of this name.

    Raises UserError when a CSV has not these columns.
    """
    if path.suffix == ".csv":
        return sheet(path, root, (column,))
    rows = words(path, root, 2)
    return Sheet(
        path,
        path.relative_to(root).as_posix(),
        (column,),
        0,
        (row if isinstance(row, Refused) else (row[0], row[1][0], row[1][1:]) for row in rows),
    )


def _comma_separated(path: Path, root: Path, columns: tuple[str, ...]) -> Iterator[Entry | Refused]:
    for row in table(path, root, _KEY, columns):
        yield row if isinstance(row, Refused) else (row[0], row[1][_KEY], [row[1][column] for column in columns])


def _counted(path: Path, root: Path, width: int, count: tuple[int, str], skip: int) -> Iterator[Entry | Refused]:
    read = 0
    for row in words(path, root, 1 + width, skip=skip):
        read += 1
        yield row if isinstance(row, Refused) else (row[0], row[1][0], row[1][1:])
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
