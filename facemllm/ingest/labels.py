"""Label files as they come: BOM, CRLF, runs of blanks, ragged and duplicate rows, NaN, foreign encodings.

`lines` and `table` stream. What is wrong with the file as a whole raises UserError; what is wrong with one row is
yielded as `Refused`, so that the other rows survive. Line numbers count from 1, header lines included.
At the end: names and values of the yes-or-no attributes of CelebA, LFWA and MAAD-Face, however a file spells and codes
them.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

from facemllm.errors import UserError
from facemllm.ingest.reader import Refuse, Refused, allowed, composed, namesakes
from facemllm.tables.schemas import CELEBA, LFWA_ONLY, MAAD_ONLY

Row = tuple[int, dict[str, str]]
MAX_LINE = 100_000  # characters; less than what csv takes for one field
_BUCKETS = 16_384
_TORN = "line break inside quotes, or a quote that is never closed; write the row on one line"

_CELEBA_ONLY = ("Blurry", "Mouth_Slightly_Open", "Narrow_Eyes", "Pale_Skin", "Straight_Hair", "Wearing_Necklace")
MAAD = (*(name for name in CELEBA if name not in _CELEBA_ONLY), *MAAD_ONLY)
"""The 47 attributes of MAAD-Face."""

_ASKED = (
    *("Dark_Brown_Hair", "Red_Hair", "White_Hair", "Short_Hair", "Medium_Hair", "Long_Hair", "Buzz_Cut", "Hair_Bun"),
    *("Dark_Eyes", "Hazel_Eyes", "Green_Eyes", "Blue_Eyes", "Gray_Eyes", "Full_Beard", "Sunglasses"),
)

ATTRIBUTES = tuple(dict.fromkeys((*CELEBA, *MAAD_ONLY, *LFWA_ONLY, *_ASKED)))
"""Those that users may give labels for: of the three datasets, and those that questions are about."""


class Names:
    """A set of names at ten to thirty bytes each, for lists of millions: digests of 64 bits in buckets.

    Two names among n are taken for one with a chance of about n * n / 2**65: 3e-7 at three million.
    """

    def __init__(self) -> None:
        self._buckets: dict[int, array[int]] = {}

    def add(self, name: str) -> bool:
        """Put a name in; whether it was new."""
        digest = _digest(name)
        bucket = self._buckets.setdefault(digest % _BUCKETS, array("Q"))
        if new := digest not in bucket:
            bucket.append(digest)
        return new

    def __contains__(self, name: object) -> bool:
        digest = _digest(str(name))
        return digest in self._buckets.get(digest % _BUCKETS, ())


def _digest(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest())


def existing(root: Path, *candidates: str) -> Path:
    """The first of several places of a file or folder under `root`. Raises UserError naming those that were tried."""
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise UserError(f"{root}: {' or '.join(candidates)} is missing; give the folder that holds it")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends, empty ones left out. Raises UserError when the file is no UTF-8 text."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file; put the label file itself here")
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), start=1):
                if len(line) > MAX_LINE:
                    raise UserError(f"{path}, line {number}: longer than {MAX_LINE} characters; this is no label file")
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def table(
    path: Path,
    root: Path,
    key: str | None,
    columns: Sequence[str] = (),
    without_header: Sequence[str] = (),
    part: str = "",
) -> Iterator[Row | Refused]:
    """Rows of a comma-separated file with a header: line number and values by column name, stripped of blanks.

    `key` tells rows apart (None: the first column does). `without_header` are the columns of a file that may lack it: a
    first line of so many fields and no `key` is a row. `part` is a column that tells rows of one key apart.
    Raises UserError when `key` or one of `columns` is not in the
    header, or a name stands there twice. A row with too few or too many fields, or whose `key` is empty or has been
    seen, is refused.
    """
    name = within(path, root).relative_to(root).as_posix()
    numbered = lines(path)
    _, first = next(numbered, (1, ""))
    if not first:
        raise UserError(f"{path}: empty; a header line was expected")
    header = split_header(path, 1, first)
    key = header[0] if key is None else key
    if key not in header and len(header) == len(without_header):
        header, numbered = list(without_header), lines(path)
    if missing := [column for column in (key, *columns) if column not in header]:
        raise UserError(f"{path}, line 1: column {', '.join(missing)} is missing; found {', '.join(header)}")
    if len(set(header)) < len(header):
        raise UserError(f"{path}, line 1: a column stands there twice; found {', '.join(header)}")
    seen = Names()
    torn = 0
    for number, line in numbered:
        try:
            values = fields(line, len(header))
        except Refuse as error:
            rest = f"; perhaps the rest of line {torn}, which has a line break inside quotes" if torn else ""
            torn = number if str(error) == _TORN else torn
            yield Refused(name, number, str(error) if torn == number else f"{error}{rest}")
            continue
        torn = 0
        row = dict(zip(header, values, strict=True))
        if not row[key]:
            yield Refused(name, number, f"column {key} is empty")
        elif not seen.add(f"{row[key]}\0{row.get(part, '')}"):
            yield Refused(name, number, f"{row[key]} has a row already")
        else:
            yield number, row


def split_header(path: Path, number: int, line: str) -> list[str]:
    """The column names of a header line. Raises UserError when it is none."""
    try:
        return [part.strip() for part in next(csv.reader([line]))]
    except (csv.Error, StopIteration) as error:
        raise UserError(f"{path}, line {number}: not a header of comma-separated names ({error})") from None


def fields(line: str, count: int) -> list[str]:
    """The values of a comma-separated line, stripped of blanks. Raises Refuse when they are not `count`."""
    try:
        values = [part.strip() for part in next(csv.reader([line], strict=True))]
    except (csv.Error, StopIteration) as error:
        if str(error) == "unexpected end of data":
            raise Refuse(_TORN) from None
        raise Refuse(f"not a row of comma-separated values ({error})") from None
    if len(values) != count:
        raise Refuse(f"{len(values)} fields where the header has {count}")
    return values


def within(path: Path, root: Path) -> Path:
    """A label file under the root, or where links may lead. Raises UserError when a link leads elsewhere: what it holds
    is not the dataset's."""
    if not allowed(path, root):
        raise UserError(
            f"{path}: a link that leads out of {root}; put the file itself there, or name {path.resolve().parent} in"
            " ingest.links"
        )
    return path


def words(path: Path, root: Path, count: int, *, skip: int = 0) -> Iterator[tuple[int, list[str]] | Refused]:
    """Rows of `count` words between runs of blanks; the first `skip` lines are headers. The first word is the row's
    key: a row with another number of words, or whose key has been seen, is refused."""
    name = within(path, root).relative_to(root).as_posix()
    seen = Names()
    for number, line in lines(path):
        if number <= skip:
            continue
        parts = line.split()
        if len(parts) != count:
            yield Refused(name, number, f"{len(parts)} fields where {count} were expected")
        elif not seen.add(parts[0]):
            yield Refused(name, number, f"{parts[0]} has a row already")
        else:
            yield number, parts


def inside(root: Path, name: str) -> Path:
    """The path of a picture that a label file names, in the Unicode form in which its folder has it. Raises Refuse when
    it is absolute, leads out of the root, or several files have the name in other forms.

    Whether it exists, and whether a link leads out, is the importer's to find out.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if not parts.parts or "\0" in name or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
        raise Refuse(f"the path {name!r} leads out of the dataset's folder")
    if name.isascii():
        return root / parts
    place = root
    for part in parts.parts:
        same = [there for there in namesakes(place / part) if composed(there) == composed(part)]
        if len(same) > 1 and part not in same:
            raise Refuse(f"{part} is {len(same)} files, each in another Unicode form of the name; rename all but one")
        place /= part if part in same or not same else same[0]
    return place


def number(text: str, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from text. Raises Refuse saying `what` is wrong with it."""
    try:
        if "_" in text or not text.isascii():
            raise ValueError("Python would read 1_0 as ten")
        value = float(text)
    except ValueError:
        raise Refuse(f"{what} is {text!r}, not a number") from None
    if not math.isfinite(value) or not low <= value <= high:
        raise Refuse(f"{what} is {text}, outside {low:g} to {high:g}")
    return value


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


_KNOWN = {_plain(name): name for name in CELEBA + MAAD}


def spelled(name: str) -> str:
    """An attribute's name as CelebA or MAAD-Face spells it; one that neither has, with `_` between its words."""
    known = _KNOWN.get(_plain(name))
    return known or "_".join(name.replace("'", "").replace("-", " ").replace("_", " ").split())


def attribute_names(path: Path, line: int, found: Sequence[str], expected: Sequence[str]) -> list[str]:
    """The attributes that a header names, in its order, as CelebA or MAAD-Face spells them.

    Raises UserError when one stands there twice, is not among `expected`, or is missing.
    """
    names = [spelled(name) for name in found]
    twice = {name for name in names if names.count(name) > 1}
    unknown = [name for name in names if name not in expected]
    missing = [name for name in expected if name not in names]
    for what, which in (("there twice", sorted(twice)), ("unknown", unknown), ("missing", missing)):
        if which:
            where = f"{path}, line {line}" if line else str(path)
            raise UserError(f"{where}: column {', '.join(which)} is {what}; these were expected: {' '.join(expected)}")
    return names


class Coding:
    """How a label file codes what is absent: -1 or 0, whichever it uses first, and from then on nothing else.

    Present is 1 in either.
    """

    def __init__(self) -> None:
        self._negative: str | None = None

    def truths(self, names: Sequence[str], values: Sequence[str]) -> dict[str, bool]:
        """Truth of each attribute. Raises Refuse when a value is foreign to the file's coding."""
        for name, value in zip(names, values, strict=True):
            if value not in ("1", "-1", "0"):
                raise Refuse(f"{name} is {value!r}; 1 and -1, or 1 and 0, were expected")
        if "-1" in values and "0" in values:
            raise Refuse("-1 and 0 in one row; 1 and -1, or 1 and 0, were expected")
        negative = next((value for value in ("-1", "0") if value in values), None)
        self._negative = self._negative or negative
        if negative not in (None, self._negative):
            raise Refuse(f"{names[values.index(str(negative))]} is {negative} in a file of 1 and {self._negative}")
        return {name: value == "1" for name, value in zip(names, values, strict=True)}


def known_truths(names: Sequence[str], values: Sequence[str]) -> dict[str, bool]:
    """Truth of each attribute coded 1 (present) or -1 (absent); one coded 0, undefined, is left out.

    Raises Refuse for any other value.
    """
    for name, value in zip(names, values, strict=True):
        if value not in ("1", "-1", "0"):
            raise Refuse(f"{name} is {value!r}; 1, -1 or 0 was expected")
    return {name: value == "1" for name, value in zip(names, values, strict=True) if value != "0"}


def attribute_columns(attributes: Mapping[str, bool]) -> dict[str, Any]:
    """Columns of `faces` that attributes give: themselves, and the gender that `Male` says, as annotated."""
    found: dict[str, Any] = {"attributes": attributes}
    if "Male" in attributes:
        found["gender"] = "male" if attributes["Male"] else "female"
    return found
