"""What a reader of a native dataset layout gives, and the helpers with which it goes through folders and files.

A reader only reads label files and says where each picture lies and what is known of it: one `Face` a picture crop, or
a `Refused` row with its reason. It is a generator and keeps no more in memory than its label table needs. `importing`
opens the pictures (hostile until checked), turns them upright, crops, reduces, encodes them and writes the table.

Label files are read with `labels.py` (`table`, `words`, `inside`, `number`); `ages.read_fairface` is good to copy.
A module of `readers/` holds `READERS`: a `Reader` by its key in the ledger.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from facemllm.errors import UserError

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
"""Endings of file names, in small letters, that are taken for pictures where a folder holds other files, too."""

FOREIGN = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif", ".jxl", ".jp2")
"""Endings of pictures that are not read; their content tells what to do with them."""

MAX_SMALL = 64 * 2**10
_NESTED = 3

Row = TypeVar("Row")


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used: its file relative to the root, its line there (from 1; 0: it has none), and why."""

    file: str
    row: int
    reason: str


class Refuse(Exception):
    """Raised where what is read shows that a row cannot be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face as its source gives it.

    `image` is the encoded picture: a path under the root, or the bytes where it comes out of an archive. `file` names
    it relative to the root with `/` between parts (a member of an archive: `archive.tar/member`), and may be left out
    where `image` is a path; `row` is its line in the label file (0 if it has none). `subject` is the source's own name
    of the person, None if unknown. `split` is the source's own, None if it names none. `crop` is in pixels of the
    upright picture and may reach beyond it. `labels` are columns of `faces` (`tables.LABELS`): `attributes` and
    `action_units` as plain mappings, `box` and `landmarks` in pixels of the upright, uncropped picture, `segmentation`
    as a uint8 array (height, width) of CelebAMask-HQ classes that covers the whole picture at any scale. `more` gives
    further labels that cost reading another file (and may give `crop`, too); it runs where the picture is opened.
    `official`, if given, takes the place of the reader's own. `photo` names the picture of several faces that this one
    is cut from: those without `subject` are drawn into one split.
    """

    file: str = ""
    row: int = 0
    source_id: str
    image: Path | bytes
    subject: str | None = None
    split: str | None = None
    crop: Box | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[], Mapping[str, Any]] | None = None
    official: tuple[str, ...] | None = None
    photo: str = ""


@dataclass(frozen=True)
class Reader:
    """A native layout. `read(root, options)` streams everything under a root and raises UserError when a label file is
    missing or has not the stated form; `options` are the values that an option may have, the first being the default
    (none: any text); `official` are the splits that its own files name: those missing are carved out of train."""

    read: Callable[[Path, Mapping[str, str]], Iterator[Face | Refused]]
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    official: tuple[str, ...] = ()


def faces(
    rows: Iterable[tuple[int, Row] | Refused], file: str, made: Callable[[int, Row], Face | None]
) -> Iterator[Face | Refused]:
    """What `made` makes of each numbered row of a label file. A row for which it raises Refuse becomes `Refused`, one
    that was refused before stays so; None leaves a row out."""
    for row in rows:
        if isinstance(row, Refused):
            yield row
            continue
        try:
            found = made(*row)
        except Refuse as error:
            yield Refused(file, row[0], str(error))
            continue
        if found is not None:
            yield replace(found, row=row[0])


def listing(folder: Path) -> list[str]:
    """Sorted names of what lies in a folder, hidden ones left out. Raises UserError when it cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None


def files(folder: Path) -> list[str]:
    """Sorted names of what lies in a folder and is no folder, hidden ones left out. Raises UserError."""
    return [name for name in listing(folder) if not (folder / name).is_dir()]


def folders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, hidden ones left out. Raises UserError."""
    return [name for name in listing(folder) if (folder / name).is_dir()]


def unlabelled(folder: Path, root: Path, named: Iterable[str], label_file: str) -> Iterator[Refused]:
    """The files of a folder that no label row names, each refused. Raises UserError when it cannot be listed."""
    known = set(named)
    for name in files(folder):
        if name not in known:
            yield Refused((folder / name).relative_to(root).as_posix(), 0, f"no label row in {label_file}")


def folder(root: Path, *candidates: str) -> Path:
    """The folder of pictures: the first of several places under `root` that is one, or the folder of the same name in
    it, which archives of archives leave behind. Raises UserError naming those that were tried."""
    for candidate in candidates:
        found = root / candidate
        if found.is_dir():
            for _ in range(_NESTED):
                found = found / found.name if (found / found.name).is_dir() else found
            return found
    raise UserError(f"{root}: the folder {' or '.join(candidates)} is missing; give the folder that holds it")


def unlabelled_pictures(root: Path, place: Path, labelled: Container[str]) -> Iterator[Refused]:
    """The pictures right in a folder that are not among `labelled` (paths relative to the root), in name order."""
    inside = place.relative_to(root).as_posix()
    for name in listing(place):
        if name.lower().endswith(PICTURES) and f"{inside}/{name}" not in labelled:
            yield Refused(f"{inside}/{name}", 0, "no label row")


def contents(path: Path, root: Path, limit: int, name: str = "") -> bytes:
    """Bytes of a file under the root, as hostile as any: read only when it is a regular file of at most `limit` bytes.

    Raises Refuse when it is not, is missing, or a link leads out of the root and of the folders that `follow` allows;
    `name` is what the reason calls it.
    """
    what, at = name or "the picture", f"{name}: " if name else ""
    try:
        place = os.path.join(_real_folder(str(path.parent)), path.name)
        real = os.path.realpath(place, strict=True) if os.path.islink(place) else place
        if not real.startswith((_under(root), *_ALLOWED)):
            raise Refuse(f"{at}a link leads out of the dataset's folder; name where it leads in ingest.links")
        # without O_NONBLOCK a named pipe would hold the reader for ever
        with open(real, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Refuse(f"{at}not a regular file")
            if status.st_size > limit:
                raise Refuse(f"{at}the file has {status.st_size:,} bytes, more than {limit:,}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise Refuse(f"{what} is a link to a file that is not there") from None
        there = namesakes(path)
        raise Refuse(
            f"{what} is missing" + (f"; there is {there[0]}: write the name as it is" if there else "")
        ) from None
    except (OSError, RuntimeError) as error:
        raise Refuse(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def follow(folders: Iterable[str]) -> None:
    """Let links lead into these folders, too (`ingest.links`), in this process and until the next call."""
    _ALLOWED[:] = [os.path.join(os.path.realpath(os.path.expanduser(folder)), "") for folder in folders]


_ALLOWED: list[str] = []  # label files and pictures are opened far below whoever knows the settings


def walk(root: Path, unread: Callable[[OSError], object] | None = None) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder under the root that is not hidden, in order, with the names in it of links to folders, and of files.
    Links to folders outside the root that `follow` allows are gone through and not named; `unread` gets errors."""
    met: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=unread, followlinks=True):
        met.add(os.path.realpath(folder))
        links = []
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            real = os.path.realpath(os.path.join(folder, name))
            if real in met or os.path.join(real, "").startswith(_under(root)) or not allowed(Path(real), root):
                folders.remove(name)
                links.append(name)
            met.add(real)
        yield Path(folder), links, sorted(files)


def allowed(path: Path, root: Path) -> bool:
    """Whether a file or folder lies under the root, or where `follow` lets links lead."""
    return os.path.join(os.path.realpath(path), "").startswith((_under(root), *_ALLOWED))


def _under(root: Path) -> str:
    return os.path.join(_real_folder(str(root)), "")


def namesakes(path: Path) -> list[str]:
    """Names in a path's folder that differ from its own in small and capital letters or in Unicode form alone."""
    try:
        names = _names(str(path.parent), path.parent.stat().st_mtime_ns)
    except OSError:
        return []
    return names.get(composed(path.name).casefold(), [])


@lru_cache(maxsize=4)
def _names(folder: str, changed_ns: int) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        found.setdefault(composed(name).casefold(), []).append(name)
    return found


def composed(text: str) -> str:
    """Text in Unicode's composed form (NFC): macOS and some archives part letters from their accents."""
    return unicodedata.normalize("NFC", text)


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    """A folder without links on its way; few hold many pictures, so it is looked up once."""
    return os.path.realpath(folder)


def small(path: Path, root: Path) -> bytes:
    """Bytes of a file that belongs to one picture, at most `MAX_SMALL`. Raises Refuse, see `contents`."""
    return contents(path, root, MAX_SMALL, path.name)


def small_rows(path: Path, root: Path) -> list[list[str]]:
    """Words of each line that is not empty, of a text file that belongs to one picture. Raises Refuse, see `small`."""
    try:
        text = small(path, root).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refuse(f"{path.name}: not UTF-8 text") from None
    return [words for line in text.splitlines() if (words := line.split())]


def snake(text: str) -> str:
    """A name in lower snake_case: "East Asian" -> "east_asian"."""
    return re.sub(r"\W+", "_", composed(text).strip()).strip("_").lower()


def code(text: str, values: Sequence[str | None], what: str, first: int = 0) -> str | None:
    """The value that a whole number stands for, the first value having number `first`. Raises Refuse."""
    last = first + len(values) - 1
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not first <= int(text) <= last:
        raise Refuse(f"{what} is {text!r}, not one of {first} to {last}")
    return values[int(text) - first]


def whole(options: Mapping[str, str], name: str, default: int, low: int = 1) -> int:
    """A whole number from `low` up. Raises UserError."""
    text = options.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= low):
        raise UserError(f"option {name} is {text!r}; give a whole number from {low} up")
    return int(text)


def share(options: Mapping[str, str], name: str, default: float) -> float:
    """A number from 0 to 1. Raises UserError."""
    text = options.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"option {name} is {text!r}; give a number from 0 to 1")
    return value
