"""Cache files that appear with all their bytes or not at all, whoever else writes to their folder."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STALE_SECONDS = 86_400


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: when the block ends well, its bytes are flushed to disk and it becomes `path`.

    What processes that were killed left in the folder is removed once it is a day old. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path.parent)
    # a number of the process would not do: machines that share a disk count alike
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    for left in folder.glob(".*.npy.*.partial"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()
        except OSError:  # another process was faster, or the file is another user's
            continue
