"""A model directory as file -> SHA-256, and a private copy of exactly the bytes that were hashed.

Every file is opened once, without following links, by the descriptor of its folder: no name is looked up twice, so
nothing can be exchanged between a look and a read. What a directory may not hold is what a digest of names and contents
would not tell (links, empty folders) or what a loader could be surprised by (pipes, devices, hidden files, odd names).

`Manifest.digest` is `digests.of_tree` of the same directory: the model's identity everywhere.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from types import MappingProxyType

from facemllm.core import digests
from facemllm.core.files import publish, writing
from facemllm.core.machine import cores
from facemllm.errors import UserError
from facemllm.signing.canonical import Refused

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,199}")
MOST_FILES = 10_000
MOST_LEVELS = 16
_BLOCK = 1 << 18  # stays in a core's own cache
_BEHIND = 1 << 24
_CLONE = 0x40049409  # FICLONE of linux/fs.h
COPY = "facemllm-model-"
_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
_KINDS |= {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO put in a file's place must not block
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Manifest:
    """The files of a model directory: relative path to hex SHA-256, in the order of the paths, and their size."""

    files: Mapping[str, str]
    bytes: int

    @cached_property
    def digest(self) -> str:
        """The model's identity: `digests.of_tree` of the directory."""
        return digests.of_json([[path, sha256] for path, sha256 in self.files.items()])

    def differs(self, expected: Mapping[str, str]) -> str:
        """The first difference from the files that a directory should hold, in words; empty if there is none."""
        for path in sorted({*self.files, *expected}):
            if path not in expected:
                return f"{path} was added"
            if path not in self.files:
                return f"{path} is missing"
            if self.files[path] != expected[path]:
                return f"{path} was changed"
        return ""


def of(folder: Path) -> Manifest:
    """The manifest of a model directory, read now by one thread a core. Raises Refused ("files") for what none may
    hold."""
    return _read(folder, None)


def require(folder: Path, digest: str, files: Mapping[str, str] | None = None) -> Manifest:
    """The manifest of a directory that has this digest. Raises Refused ("digest") for any other, and as `of`; of the
    `files` that it should hold, where they are known, the one that differs is named."""
    return _of_digest(folder, _read(folder, None), digest, files)


@contextmanager
def verified_copy(
    folder: Path, digest: str, scratch: Path | None = None, files: Mapping[str, str] | None = None
) -> Iterator[tuple[Path, Manifest]]:
    """A private copy of a model directory that has this digest, to load from; it is gone afterwards.

    The bytes of the copy are those that were hashed, whatever happens to `folder` meanwhile. It is made in `scratch`
    (default: the system's temporary folder), readable by this user alone. Raises as `require`, and UserError where
    there is no room.
    """
    with private_folder(scratch or Path(tempfile.gettempdir())) as private:
        copy = private / "model"
        yield copy, _of_digest(folder, _read(folder, copy), digest, files)


def copy_to(folder: Path, digest: str, out: Path, files: Mapping[str, str] | None = None) -> Manifest:
    """A verified copy that stays, as the folder `out`; one of this digest that is there already is left as it is.

    Raises as `verified_copy`, and for an `out` of other bytes.
    """
    if out.exists():
        return require(out, digest, files)
    with verified_copy(folder, digest, out.parent, files) as (copy, manifest):
        publish(copy, out)
    return manifest


def _of_digest(folder: Path, found: Manifest, digest: str, files: Mapping[str, str] | None) -> Manifest:
    if found.digest != digest:
        which, shown = (f" ({found.differs(files)})", slice(12)) if files else ("", slice(None))
        have = f"{folder} has digest {found.digest[shown]}, not {digest[shown]}{which}"
        raise Refused("digest", f"{have}: its bytes are not those that were approved; put back the registered ones")
    return found


def _read(folder: Path, copy: Path | None) -> Manifest:
    """Hash every file of a directory, and copy what is hashed to `copy` if one is given."""
    found: dict[str, tuple[str, int]] = {}
    with _trouble(folder):
        top = os.open(folder, _OPEN | os.O_DIRECTORY)
    try:
        with ThreadPoolExecutor(cores()) as pool:
            _read_folder(folder, top, copy, "", found, pool)
    finally:
        os.close(top)
    files = {path: found[path][0] for path in sorted(found)}
    return Manifest(MappingProxyType(files), sum(size for _, size in found.values()))


def _read_folder(
    folder: Path, descriptor: int, copy: Path | None, prefix: str, found: dict[str, tuple[str, int]], pool: Executor
) -> None:
    """Hash the files below an open folder, whose path in the model is `prefix`, and note digest and size in `found`."""
    with _trouble(folder), os.scandir(descriptor) as listed:
        states = {entry.name: entry.stat(follow_symlinks=False) for entry in listed}
    for name, state in states.items():
        _require_plain(folder, name, state)
    if not states and not prefix:
        raise Refused("files", f"{folder} is empty, no model directory")
    if not states:
        raise Refused("files", f"{folder} is an empty folder, which no digest tells of; remove it")
    if len(found) + len(states) > MOST_FILES or prefix.count("/") > MOST_LEVELS:
        raise Refused(
            "files", f"{folder}: no model has more than {MOST_FILES} files or {MOST_LEVELS} levels of folders"
        )
    files = {name: state.st_size for name, state in states.items() if stat.S_ISREG(state.st_mode)}
    if copy is not None:
        make(copy, sum(files.values()))
    ordered = sorted(files, key=lambda name: -files[name])  # the largest first, so that no thread ends long after
    read = pool.map(lambda name: _read_file(folder / name, descriptor, copy and copy / name), ordered)
    found.update({prefix + name: one for name, one in zip(ordered, read, strict=True)})
    for name in states.keys() - files.keys():
        with _trouble(folder / name):
            below = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=descriptor)
        try:
            _read_folder(folder / name, below, copy and copy / name, f"{prefix}{name}/", found, pool)
        finally:
            os.close(below)


def _require_plain(folder: Path, name: str, state: os.stat_result) -> None:
    shown = ascii(f"{folder}/{name}")
    kind = _KINDS.get(stat.S_IFMT(state.st_mode))
    if kind:
        raise Refused("files", f"{shown} is {kind}; a model directory holds plain files and folders alone, remove it")
    if name.startswith("."):
        raise Refused("files", f"{shown} is hidden; a model directory has no hidden files or folders, remove it")
    if not NAME.fullmatch(name):
        letters = "ASCII letters, digits and _ . + = -, at most 200 of them"
        raise Refused("files", f"{shown} has an odd name; names in a model directory are {letters}; rename it")


def _read_file(path: Path, folder: int, copy: Path | None) -> tuple[str, int]:
    """SHA-256 and size of a file, in constant memory; the same bytes go to `copy`.

    Where the file system can, the copy shares the file's blocks, and it is the copy that is hashed.
    """
    with ExitStack() as held:
        with _trouble(path):
            source = held.enter_context(open(os.open(path.name, _OPEN, dir_fd=folder), "rb", buffering=0))
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                raise Refused("files", f"{path} is no plain file any more; nothing may change a model meanwhile")
        if copy is None:
            return _hashed(path, source, None)
        with writing(copy):  # of the source's errors, `_hashed` has made another kind
            target = held.enter_context(open(os.open(copy, _CREATE, 0o400), "r+b", buffering=0))
            if _clone(source, target):
                return _hashed(path, target, None)
            return _hashed(path, source, target)


def _hashed(path: Path, source: FileIO, target: FileIO | None) -> tuple[str, int]:
    """SHA-256 and size of an open file, the one at `path`; its bytes are written to `target`."""
    hashed, size, behind = hashlib.sha256(), 0, 0
    for block in _blocks(path, source):
        hashed.update(block)
        size += len(block)
        if target is None:
            continue
        _write(target.fileno(), block)
        if size - behind >= _BEHIND:  # from now on the copy is read: its pages take the place of the source's
            _advise(source, "POSIX_FADV_DONTNEED", size)
            behind = size
    return hashed.hexdigest(), size


def _blocks(path: Path, source: FileIO) -> Iterator[memoryview]:
    """What a file holds, in blocks, each gone with the next one."""
    block, left = memoryview(bytearray(_BLOCK)), os.fstat(source.fileno()).st_size
    _advise(source, "POSIX_FADV_SEQUENTIAL")
    with _trouble(path):
        while count := source.readinto(block):
            left -= count
            if left < 0:
                raise Refused("files", f"{path} grows while it is read; nothing may change a model while it is checked")
            yield block[:count]


def _clone(source: FileIO, target: FileIO) -> bool:
    """Whether `target` shares the blocks that `source` has at this moment (Btrfs, XFS); changing either parts them."""
    try:
        fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
    except OSError:
        return False
    return True


def _advise(file: FileIO, advice: str, size: int = 0) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, size, getattr(os, advice))


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def make(copy: Path, size: int) -> None:
    """Make the folder of a copy. Raises UserError where its files' bytes do not fit on the disk."""
    with writing(copy):
        copy.mkdir(mode=0o700)
        free = shutil.disk_usage(copy).free
    if free < size:
        need, have = (f"{count / 1e9:.1f} GB" for count in (size, free))
        raise UserError(f"cannot copy {need} to {copy.parent}: {have} are free; free some, or choose another --scratch")


@contextmanager
def private_folder(scratch: Path) -> Iterator[Path]:
    """A new folder in `scratch` that only this user can read. It is gone afterwards; that of a process that was killed,
    when the next one is made."""
    with writing(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        _tidy(scratch)
        while True:
            made = Path(tempfile.mkdtemp(prefix=COPY, dir=scratch))
            lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if made.is_dir():  # else another process tidied it away before it was locked
                break
            os.close(lock)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def _tidy(scratch: Path) -> None:
    """Remove the copies of processes that were killed: those whose lock ended with them."""
    for left in scratch.glob(f"{COPY}*"):
        with suppress(OSError):
            descriptor = os.open(left, _OPEN | os.O_DIRECTORY)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextmanager
def _trouble(path: Path) -> Iterator[None]:
    """What the system says of a path in a model directory, as a UserError."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ELOOP: "is a symbolic link; give the folder itself",
            errno.ENOTDIR: "is no folder, or a symbolic link to one; give the folder itself",
            errno.ENOENT: "is not a model directory: it does not exist",
            errno.ENXIO: "is no plain file",
        }
        reason = reasons.get(error.errno or 0, f"cannot be read: {error.strerror or error}")
        raise Refused("files", f"{path} {reason}") from None
