"""Replies of models, kept for good: one small JSON file a reply, under `storage.home/annotations/replies`.

A reply is named by its content key: the digest of the picture's `image_id`, the words asked, the model and its
parameters. What was asked once is read from here ever after, whichever table, run or process asks. A reply is kept as
it came, fit or not, so a row whose reply and repair do not fit is refused again without being paid for again. When a
reply came and what it cost then stand here and not in the table: a job that was killed and one that was not have to
give the same table. File names begin with the `image_id`, so that everything said about a picture can be purged.

A claim (a byte of the file `claims`, locked by the process that asks) keeps two processes from asking the same thing;
the kernel drops it when its holder dies. A note beside the reply's place says that a request is under way: a note that
nobody claims is of a process that died before it could store the reply, and so of a request in doubt. Where Ray's
workers are on several machines, `storage.home` has to be one folder of all of them, on a file system with locks.

Imports nothing beyond the standard library: the courier has to start fast.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

_IMAGE_ID = re.compile(r"[0-9a-f]{64}")
_NOTE, _REPLY = ".sending", ".json"
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply as it came. `text` is None when it could not be kept, and `error` says why. Tokens are None when the
    answer did not count them. `time` is UTC; `cost` is at the prices of that time."""

    key: str
    image_id: str
    model: str
    prompt_hash: str
    text: str | None
    error: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str = ""
    seconds: float = 0.0
    time: str = ""
    cost: float | None = None


@dataclass(frozen=True)
class Replies:
    """The replies under one `storage.home`."""

    home: Path

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return folder(self.home) / "replies"

    def read(self, image_id: str, key: str) -> Reply | None:
        """The reply of that key, or None. Raises ValueError when the image_id is none."""
        path = self._path(image_id, key, _REPLY)
        try:
            return Reply(**json.loads(path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def has(self, image_id: str, key: str) -> bool:
        """Whether the reply of that key is there."""
        return bool(_IMAGE_ID.fullmatch(image_id)) and self._path(image_id, key, _REPLY).is_file()

    def write(self, reply: Reply) -> None:
        """Keep a reply: on disk for good, whole or not at all."""
        path = self._path(reply.image_id, reply.key, _REPLY)
        path.parent.mkdir(parents=True, exist_ok=True)
        durable_write(path, json.dumps(asdict(reply), indent=1).encode())

    def note(self, image_id: str, key: str) -> None:
        """Write down that a request is going out, before it does, on disk for good."""
        path = self._path(image_id, key, _NOTE)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
        _sync_folder(path.parent)

    def noted(self, image_id: str, key: str) -> bool:
        """Whether a request was written down and its outcome was not: to who holds the claim, it is in doubt."""
        return self._path(image_id, key, _NOTE).exists()

    def unnote(self, image_id: str, key: str) -> None:
        """Take the note away: the reply is kept, or it is certain that there is none."""
        self._path(image_id, key, _NOTE).unlink(missing_ok=True)

    def of_image(self, image_id: str) -> Iterator[Path]:
        """Every file about a picture."""
        parent = self._path(image_id, "", _REPLY).parent
        with contextlib.suppress(FileNotFoundError), os.scandir(parent) as files:
            yield from (Path(file.path) for file in files if file.name.lstrip(".").startswith(f"{image_id}."))

    def _path(self, image_id: str, key: str, suffix: str) -> Path:
        if not _IMAGE_ID.fullmatch(image_id):
            raise ValueError(f"image_id {image_id[:80]!r} is no SHA-256")
        return self.folder / image_id[:3] / f"{image_id}.{key}{suffix}"


class Claims:
    """The right to ask for a key, held by this process until it gives it back or dies."""

    def __init__(self, home: Path) -> None:
        path = folder(home) / "claims"
        path.parent.mkdir(parents=True, exist_ok=True)
        # one descriptor for good: closing any of a file drops all locks that the process has on it
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def take(self, key: str) -> bool:
        """Claim a key; False while another process has it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(key))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def give(self, key: str) -> None:
        """Give a key back."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place(key))

    def close(self) -> None:
        """Give everything back."""
        os.close(self._file)


def price(
    prompt_tokens: int | None, completion_tokens: int | None, input_price: float | None, output_price: float | None
) -> float | None:
    """What tokens cost at prices per million; None when a price is not known. Uncounted tokens are free."""
    if input_price is None or output_price is None:
        return None
    return ((prompt_tokens or 0) * input_price + (completion_tokens or 0) * output_price) / 1e6


def folder(home: Path) -> Path:
    """The folder of this room under `storage.home`."""
    return home / "annotations"


def purge(home: Path, image_ids: Iterable[str], wait_s: float = 120.0) -> int:
    """Remove every reply about these pictures; how many there were.

    A request about one of them that is under way is waited for, so that its reply does not come after. Raises
    TimeoutError when one is still under way after `wait_s` seconds: stop the job that asks, and purge again.
    """
    replies, removed = Replies(home), 0
    claims: Claims | None = None
    deadline = time.monotonic() + wait_s
    try:
        for image_id in image_ids:
            for note in [path for path in replies.of_image(image_id) if path.suffix == _NOTE]:
                claims = claims or Claims(home)
                key = note.name.removesuffix(_NOTE).partition(".")[2]
                while not claims.take(key):
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"a request about image {image_id[:12]} is still under way")
                    time.sleep(_POLL_S)
                claims.give(key)
            for path in list(replies.of_image(image_id)):
                path.unlink(missing_ok=True)
                removed += path.suffix == _REPLY
    finally:
        if claims is not None:
            claims.close()
    return removed


def durable_write(path: Path, data: bytes) -> None:
    """Write a file under another name beside it, flush it to disk, and rename it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(key: str) -> int:
    return int(key[:15], 16)
