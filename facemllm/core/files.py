"""Files and folders that appear whole or not at all, locks between processes, and trouble with the disk in words; and
checkpoints by name: a folder of the project, or what the Hugging Face hub holds under an id.

What is unfinished stands beside its goal as `.<name>.<random>.partial`: random, since machines that share a disk count
their processes alike.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from facemllm.core import digests
from facemllm.errors import UserError, one_line

_STALE_SECONDS = 86_400
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def atomic_write(path: Path, data: bytes) -> None:
    """Replace a file's content in one step, on disk before it is seen. Raises UserError when it cannot be written."""
    with writing(path), atomic_file(path) as partial:
        partial.write_bytes(data)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def atomic_file(path: Path, tidy: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to: when the block ends well, its bytes are flushed to disk and it becomes `path`.

    With `tidy`, unfinished files that killed processes left in the folder are removed once they are a day old. Raises
    OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if tidy:
        _tidy(path.parent)
    partial = beside(path)
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def private(path: str, flags: int) -> int:
    """An opener for `open`: what it makes, its owner alone can read."""
    return os.open(path, flags, 0o600)


def require_absent(out: Path) -> None:
    """Raises UserError when `out` exists."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another output folder or remove it")


def partial_folder(out: Path) -> Path:
    """An empty folder beside `out` to build it in. Raises UserError when `out` exists or cannot be written."""
    require_absent(out)
    partial = beside(out)
    with writing(out):
        partial.mkdir(parents=True)
    return partial


def publish(partial: Path, out: Path) -> None:
    """Flush a finished folder to disk and rename it into place. Raises UserError if `out` exists or cannot be made."""
    with writing(out):
        for file in (p for p in partial.rglob("*") if p.is_file()):
            _flush(file)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
        _flush(out.parent)


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its place when the block ends well, and is removed otherwise. Raises
    UserError as `partial_folder` and `publish`."""
    partial = partial_folder(out)
    try:
        yield partial
        publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def settle(partial: Path, out: Path) -> None:
    """Put a finished folder in its place, which is named after what it holds. One that is there already and has the
    same bytes stays, since somebody may be reading it; another, which must be damaged, is replaced in one step.

    Raises UserError when it cannot be written.
    """
    try:
        publish(partial, out)
        return
    except UserError:
        if not out.is_dir():
            raise
    with writing(out):
        if digests.of_tree(out, fresh=True) != digests.of_tree(partial):
            _exchange(partial, out)
    shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Give two folders each other's name: in one step where the file system can (not on NFS), else in three."""
    libc = ctypes.CDLL(None)
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    if not hasattr(libc, "renameat2") or libc.renameat2(*names, _RENAME_EXCHANGE):
        aside = beside(other)
        other.rename(aside)
        one.rename(other)
        aside.rename(one)
    _flush(other.parent)


def remove_unfinished(out: Path) -> None:
    """Remove what killed processes left of `out` beside it, for a caller that alone writes there."""
    for left in out.parent.glob(f".{out.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(
    path: Path,
    taken: str | None = None,
    wait_s: float = 0.0,
    *,
    note: str = "",
    waiting: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold the lock file `path`, whose folder is made if absent; afterwards the file is gone, and an empty folder.

    While another process or thread holds it this one waits, once it has called `waiting` with the holder's note; where
    the words `taken` are given, for `wait_s` seconds, then it raises UserError with these words and that note, which is
    `pid N` unless `note` says more. A lock ends with its holder, even killed.
    """
    lock = filelock.FileLock(path)
    patience = 0.0 if waiting else -1.0 if taken is None else wait_s
    with writing(path):
        while not lock.is_locked:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                if path.parent.exists():  # a file; else its last holder took the empty folder away meanwhile
                    raise
                continue
            try:
                lock.acquire(timeout=patience)
            except filelock.Timeout:
                if waiting is None:
                    raise UserError(f"{taken} (lock {path}, {_holder(path)})") from None
                waiting(_holder(path))
                waiting, patience = None, -1.0 if taken is None else wait_s
            except FileNotFoundError:  # its last holder took the empty folder away
                continue
    with suppress(OSError):  # on a full disk the lock holds all the same
        path.write_text(note or f"pid {os.getpid()}")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is released: filelock takes no file that has no name
        lock.release()
        with suppress(OSError):
            path.parent.rmdir()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Trouble with the disk while `out` is written, as a UserError: its cause and how to mend it."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space left on the device; free some and run again",
            errno.EROFS: "the file system is read-only; choose another folder (storage.home, storage.runs)",
            errno.EACCES: "permission denied; choose a folder you may write to (storage.home, storage.runs)",
            errno.EPERM: "not permitted; choose a folder you may write to (storage.home, storage.runs)",
            errno.ENOTEMPTY: "exists already; another process may have written it",
            errno.EEXIST: "exists already; another process may have written it",
            errno.ENOTDIR: "a part of this path is a file, not a folder",
        }
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise UserError(f"cannot write {out}: {reason}") from error


def placed(name: str) -> str:
    """The name of a checkpoint as processes outside of the project folder find it (Ray's workers): the absolute path of
    a folder, which may be named relative to the project; a hub id as it is."""
    from facemllm.settings import root

    with suppress(UserError):  # outside of the project: a name that was placed already
        if (folder := (root() / name).resolve()).is_dir():
            return str(folder)
    return name


def fetched(name: str, setting: str) -> Path:
    """The folder `name`, relative to the project, or that of a hub id, fetched unless HF_HUB_OFFLINE.

    Raises UserError when there is neither; `setting` is where it was named.
    """
    folder = Path(name := placed(name))
    if folder.is_absolute() and folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES), local_files_only=offline)).resolve()
    except Exception as error:  # a dozen kinds, from a malformed name to a broken connection
        reason = one_line(error, 2000)  # the hub's reasons end with what to do
        raise UserError(f"{setting}: {name} is no folder, nor a model of the hub: {reason}") from None


def content_of(name: str, setting: str) -> str:
    """What decides a checkpoint `fetched` by name: a hub id's commit, or the digest of a folder's own files.

    Reads the files of a folder whole: some seconds for every ten gigabytes.
    """
    folder = fetched(name, setting)
    files = checkpoint_files(folder)
    return folder.name if _cached(folder) else digests.of_json([[file.name, digests.of_file(file)] for file in files])


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that a checkpoint is read from, by name. Raises UserError for one that is no regular file, or lies
    outside the folder; huggingface_hub's cache keeps them in a folder of its own."""
    files = sorted({file for pattern in _FILES for file in folder.glob(pattern)})
    home = folder.resolve()
    places = [home, home.parents[1] / "blobs"] if _cached(home) else [home]
    for file in files:
        try:
            target = file.resolve(strict=True)
        except (OSError, RuntimeError):  # a link to nowhere, or round in a circle
            target = None
        if target is None or not target.is_file():
            raise UserError(f"cannot load the model {folder}: {file.name} is no regular file; fetch it again")
        if not any(target.is_relative_to(place) for place in places):
            raise UserError(
                f"cannot load the model {folder}: {file.name} is a link out of the folder, to {target}; "
                "put the file itself there (cp -rL copies a folder so)"
            )
    return files


def _cached(folder: Path) -> bool:
    """Whether a folder is a snapshot in huggingface_hub's cache."""
    return folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")


def beside(path: Path) -> Path:
    """A name beside `path` for what is not whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tidy(folder: Path) -> None:
    for left in folder.glob(".*.partial"):
        with suppress(OSError):  # another process was faster, or it is another user's, or a folder
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text("utf-8").strip() or "another process"
    return "another process"
