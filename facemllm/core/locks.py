"""Lock files: one process at a time does what two must not do at once. A lock ends with its holder, even killed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from facemllm.errors import UserError


@contextmanager
def locked(path: Path, taken: str | None = None) -> Iterator[None]:
    """Hold the lock file `path`, whose folder is made if absent; afterwards the file is gone, and an empty folder.

    While another process holds it this one waits, or raises UserError with the words `taken` where they are given.
    Machines that share a disk share its locks.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if taken is not None else 0))
            except BlockingIOError:
                raise UserError(str(taken)) from None
            if not _is(path, file.fileno()):
                continue  # its holder has removed it while this process waited
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with suppress(OSError):
                    path.parent.rmdir()
            return


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
