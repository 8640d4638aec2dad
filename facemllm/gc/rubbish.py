"""What may go from a home: named by nothing, in use by nobody, and older than the grace period."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from facemllm.core.claims import claims, held
from facemllm.gc.roots import Roots
from facemllm.promote.records import DIGEST, Records
from facemllm.settings import Settings
from facemllm.signing.manifest import COPY

_WORK = re.compile(r"[0-9a-f]{32}")
_TABLE = re.compile(r"(?:pixels|maps)-([0-9a-f]{24})-.*")
_UNNAMED = "no run, version, decision, revision or server names it"


@dataclass(frozen=True)
class Rubbish:
    """A file or folder that may go: what it is, its size, the seconds since it was last changed or used, and why."""

    what: str
    path: Path
    bytes: int
    age_s: float
    why: str


def rubbish(settings: Settings, kept: Roots, records: Records, grace_s: float) -> list[Rubbish]:
    """Everything that may go, the largest first."""
    home, found = settings.home, []
    for what, path, why in _candidates(settings, kept, records):
        if path.is_symlink() or in_use(home, what, path):
            continue
        age, size = age_of(what, path), _size(path)
        if age >= grace_s:
            found.append(Rubbish(what, path, size, age, why))
    return sorted(found, key=lambda one: (-one.bytes, one.path))


def in_use(home: Path, what: str, path: Path) -> bool:
    """Whether somebody holds a lock that such a thing is used under."""
    if what == "unfinished work":
        return held(path.with_name(f".{path.name}.lock"))
    if what in ("private copy", "lock"):
        return held(path)
    if what == "tower features":  # which say of no table that they are its
        return bool(claims(home))
    return what == "engine cache" and held(home / "run.lock")


def age_of(what: str, path: Path) -> float:
    """Seconds since a thing was last changed; of a result, since it was last taken into use; 0 where it is gone."""
    try:
        newest = path.lstat().st_mtime
        if what != "result":
            newest = max([newest, *(one.stat(follow_symlinks=False).st_mtime for one in _under(path))])
    except OSError:
        return 0.0
    return time.time() - newest


def _candidates(settings: Settings, kept: Roots, records: Records) -> Iterator[tuple[str, Path, str]]:
    home = settings.home
    for digest in sorted(records.here):
        if DIGEST.fullmatch(digest) and digest not in kept.named:
            yield "result", records.folder(digest), _UNNAMED
    for path in sorted((home / "work").glob("*")):
        if _WORK.fullmatch(path.name) and path.name not in kept.work:
            yield "unfinished work", path, "no profile's settings would go on from it"
        elif re.fullmatch(r"\.[0-9a-f]{32}\.lock", path.name):
            yield "lock", path, "its holder was killed"
    for folder in (home / "work" / "serving", Path(tempfile.gettempdir())):
        for path in sorted(folder.glob(f"{COPY}*")):
            with suppress(FileNotFoundError):  # a server that ends meanwhile removes its own
                if path.lstat().st_uid == os.getuid():
                    yield "private copy", path, "the server that made it was killed"
    for path in sorted((home / "cache").glob("*")):
        if table := _TABLE.fullmatch(path.name):
            if not any(digest.startswith(table[1]) for digest in kept.named):
                yield "pixels", path, "no table that is kept has it; it can be made again"
        elif path.name.startswith("features-"):
            yield "tower features", path, "they can be made again"
    engine = home / "cache" / "kfp"
    for folder in (engine, engine / "cache", engine / "outputs"):
        if engine.is_symlink() or folder.is_symlink():  # all that lies there goes: it has to be ours
            continue
        for path in sorted(folder.glob("*")):
            if path not in (engine / "cache", engine / "outputs"):
                yield "engine cache", path, "the store answers for it"
    places = (home, *(home / name for name in ("store", "keys", "work", "cache", "services")), settings.runs)
    for folder in (*places, *(path for path in settings.runs.glob("*") if path.is_dir() and not path.is_symlink())):
        for path in sorted(folder.glob(".*.partial")):
            yield "half-written", path, "whoever wrote it was killed"


def _under(path: Path) -> Iterator[os.DirEntry[str]]:
    if not path.is_dir():
        return
    with os.scandir(path) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _under(Path(entry.path))


def _size(path: Path) -> int:
    try:
        files = [one.stat(follow_symlinks=False).st_size for one in _under(path) if one.is_file(follow_symlinks=False)]
        return sum(files) if path.is_dir() else path.lstat().st_size
    except OSError:
        return 0
