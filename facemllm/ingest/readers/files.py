"""What readers share that go by folders and file names: sorted listings, small files beside pictures, names in words.

A file that belongs to one picture is as hostile as the picture: it is read only when it is a regular file under the
root, and small.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest.reader import Refuse, Refused

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
"""Endings of file names, in small letters, that are taken for pictures where a folder holds other files, too."""

MAX_SMALL = 64 * 2**10


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


def small(path: Path, root: Path) -> bytes:
    """Bytes of a file that belongs to one picture.

    Raises Refuse when it is missing, no regular file, a link that leads out of the root, or larger than `MAX_SMALL`.
    """
    name = path.name
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root.resolve()):
            raise Refuse(f"{name}: a link leads out of the dataset's folder")
        # without O_NONBLOCK a named pipe would hold the reader for ever
        with open(real, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Refuse(f"{name}: not a regular file")
            if status.st_size > MAX_SMALL:
                raise Refuse(f"{name}: {status.st_size:,} bytes, more than {MAX_SMALL:,}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise Refuse(f"{name} is missing") from None
    except (OSError, RuntimeError) as error:
        raise Refuse(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def small_rows(path: Path, root: Path) -> list[list[str]]:
    """Words of each line that is not empty, of a text file that belongs to one picture. Raises Refuse, see `small`."""
    try:
        text = small(path, root).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refuse(f"{path.name}: not UTF-8 text") from None
    return [words for line in text.splitlines() if (words := line.split())]


def snake(text: str) -> str:
    """A name in lower snake_case: "East Asian" -> "east_asian"."""
    return re.sub(r"\W+", "_", text.strip()).strip("_").lower()


def code(text: str, values: Sequence[str | None], what: str, first: int = 0) -> str | None:
    """The value that a whole number stands for, the first value having number `first`. Raises Refuse."""
    last = first + len(values) - 1
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not first <= int(text) <= last:
        raise Refuse(f"{what} is {text!r}, not one of {first} to {last}")
    return values[int(text) - first]
