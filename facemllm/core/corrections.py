"""Corrections of a model's answers, in a folder: what users of the server sent, for the next annotation run.

    corrections.jsonl       a line a correction, appended
    pictures/<SHA-256>      the picture as it was sent, where its sender agreed

The model server writes them, the reader `feedback` takes them into a table, `forget` removes a picture's lines and the
picture. The folder is bounded in size, and a client in how often it may write.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock

from facemllm.core.files import atomic_file, private

LINES, PICTURES = "corrections.jsonl", "pictures"
MAX_LINE = 16 * 1024
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LOCK = ".lock"
_CLIENTS = 10  # so many times a client's share may all of them write in a minute, and in all
_COUNT_AGAIN_S = 60.0


class Full(Exception):
    """The folder has reached its size, or its disk has, or a client its share of it."""


class TooOften(Exception):
    """A client, or all together, wrote too often; `retry_after` is in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many corrections; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What somebody says of an answer about a picture (`image` is the SHA-256 of its file).

    `label` is the canonical value of the item that is right, `correction` the words that said so; a question that is no
    task's has neither task, item nor label. `consent` is the sender's, to the text `consent_text` (its version); only
    then is the `picture` kept. `model` is the digest of the model that answered, `time` UTC.
    """

    image: str
    task: str | None
    item: str | None
    question: str | None
    answer: str
    correction: str
    label: str | None
    consent: bool
    consent_text: str | None
    picture: bool
    model: str
    time: str


class Corrections:
    """The folder, for whoever adds to it or removes from it; several processes may. `max_bytes` bounds all of it,
    `per_minute` how often one client may add; of the bytes, a client adds no more than a tenth while a process runs."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int = 0,
        per_minute: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self._max_bytes, self._per_minute, self._clock = folder, max_bytes, per_minute, clock
        self._recent: deque[tuple[float, str]] = deque()
        self._held, self._counted = 0, -_COUNT_AGAIN_S
        self._added = Counter[str]()  # bytes, by client
        self._thread = threading.Lock()

    def add(self, correction: Correction, picture: bytes | None, client: str) -> None:
        """Store a correction, with its picture where consent was given. Raises TooOften, Full, or OSError."""
        if (picture is not None) != correction.picture or (correction.picture and not correction.consent):
            raise ValueError("a picture is kept with consent, and only then")
        line = (json.dumps(asdict(correction), ensure_ascii=False) + "\n").encode()
        with self._thread:
            self._admit(client)
            size = len(line) + len(picture or b"")
            if len(line) > MAX_LINE or self._size() + size > self._max_bytes:
                raise Full(f"{self.folder} holds as much as it may")
            if self._added[client] + size > self._max_bytes / _CLIENTS:
                raise Full(f"{self.folder} holds as much of one client as it may")
            self.folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.folder / _LOCK):
                if picture is not None:
                    self._keep(correction.image, picture)
                _append(self.folder / LINES, line)
            self._held += size
            self._added[client] += size

    def forget(self, images: Collection[str]) -> int:
        """Remove all that is about pictures, by digest; returns how many lines and pictures went."""
        removed = 0
        if not self.folder.is_dir():
            return 0
        with filelock.FileLock(self.folder / _LOCK):
            for image in images:
                if (file := self.folder / PICTURES / image).is_file() and _DIGEST.fullmatch(image):
                    file.unlink()
                    removed += 1
            path = self.folder / LINES
            lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
            kept = [line for line in lines if _image(line) not in images]
            if len(kept) < len(lines):
                with atomic_file(path) as partial, open(partial, "wb", opener=private) as file_:
                    file_.write(b"".join(kept))
            return removed + len(lines) - len(kept)

    def holds(self, images: Collection[str]) -> bool:
        """Whether anything here is about one of these pictures."""
        lines = self.folder / LINES
        if any((self.folder / PICTURES / image).exists() for image in images if _DIGEST.fullmatch(image)):
            return True
        if not lines.is_file():
            return False
        with lines.open("rb") as file:
            return any(_image(line) in images for line in file)

    def _admit(self, client: str) -> None:
        now = self._clock()
        while self._recent and self._recent[0][0] <= now - 60:
            self._recent.popleft()
        own = [at for at, one in self._recent if one == client]
        if len(own) >= self._per_minute:
            raise TooOften(own[0] + 60 - now)
        if len(self._recent) >= _CLIENTS * self._per_minute:
            raise TooOften(self._recent[0][0] + 60 - now)
        self._recent.append((now, client))

    def _size(self) -> int:
        """Bytes in the folder; others may write there, too, so they are counted again every minute."""
        if self._clock() - self._counted >= _COUNT_AGAIN_S:
            self._held, self._counted = 0, self._clock()
            for place, _, names in os.walk(self.folder):
                for name in names:
                    with suppress(FileNotFoundError):  # another process has just renamed it
                        self._held += os.stat(os.path.join(place, name)).st_size
        return self._held

    def _keep(self, image: str, picture: bytes) -> None:
        path = self.folder / PICTURES / image
        if not path.exists():
            with atomic_file(path) as partial, open(partial, "wb", opener=private) as file:
                file.write(picture)


def read(folder: Path) -> Iterator[tuple[int, Correction | str]]:
    """Every line of a folder by its number from 1: a correction, or what is wrong with the line."""
    with (folder / LINES).open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            yield number, _parsed(line)


def _parsed(line: bytes) -> Correction | str:
    try:
        found = Correction(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return "no correction, or one that was cut short"
    optional = (found.task, found.item, found.question, found.label, found.consent_text)
    texts = (found.image, found.answer, found.correction, found.model, found.time)
    sound = all(isinstance(one, str) for one in texts) and all(one is None or isinstance(one, str) for one in optional)
    if not sound or not isinstance(found.consent, bool) or not isinstance(found.picture, bool):
        return "a value of another kind than the server writes"
    return found if _DIGEST.fullmatch(found.image) else "image is no SHA-256"


def _image(line: bytes) -> str:
    found = _parsed(line)
    return found.image if isinstance(found, Correction) else ""


def _append(path: Path, line: bytes) -> None:
    """Add a whole line, on disk when this returns; one that a crash cut short before it is ended first."""
    with open(path, "ab+", opener=private) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
