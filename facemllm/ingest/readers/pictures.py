"""Which pictures no label row names, found without holding millions of names; folders nested in themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from facemllm.errors import UserError
from facemllm.ingest.labels import Names
from facemllm.ingest.reader import Refused
from facemllm.ingest.readers.files import PICTURES, listing

_NESTED = 3


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


def unlabelled(root: Path, place: Path, labelled: Names) -> Iterator[Refused]:
    """The pictures right in a folder that are not among `labelled` (paths relative to the root), in name order."""
    inside = place.relative_to(root).as_posix()
    for name in listing(place):
        if name.lower().endswith(PICTURES) and f"{inside}/{name}" not in labelled:
            yield Refused(f"{inside}/{name}", 0, "no label row")
