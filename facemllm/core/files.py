"""Files and folders that appear whole or not at all, and trouble with the disk in words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from facemllm.errors import UserError


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, flush it to disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def publish(partial: Path, out: Path) -> None:
    """Flush a finished folder to disk and rename it into place. Raises UserError if `out` exists or cannot be made."""
    try:
        for file in (p for p in partial.rglob("*") if p.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    except OSError as error:
        raise storage_error(out, error) from error


def partial_folder(out: Path) -> Path:
    """An empty folder beside `out` to build it in. Raises UserError when `out` exists or cannot be written."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another output folder or remove it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise storage_error(out, error) from error
    return partial


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Trouble with the disk, said as a person can act on it."""
    try:
        yield
    except OSError as error:
        raise storage_error(out, error) from error


def storage_error(path: Path, error: OSError) -> UserError:
    """A failure to write `path`, with its cause and how to mend it."""
    reasons = {
        errno.ENOSPC: "no space left on the device; free some and run again",
        errno.EROFS: "the file system is read-only; choose another folder (storage.home, storage.runs)",
        errno.EACCES: "permission denied; choose a folder you may write to (storage.home, storage.runs)",
        errno.EPERM: "not permitted; choose a folder you may write to (storage.home, storage.runs)",
        errno.ENOTEMPTY: "exists already; another process may have written it",
        errno.EEXIST: "exists already; another process may have written it",
        errno.ENOTDIR: "a part of this path is a file, not a folder",
    }
    return UserError(f"cannot write {path}: {reasons.get(error.errno or 0, error.strerror or str(error))}")
