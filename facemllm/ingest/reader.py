"""What a reader of a native dataset layout gives: one `Face` a picture crop, or a `Refused` row with its reason.

A reader only reads label files and says where each picture lies and what is known of it; it is a generator and keeps
no more in memory than its label table needs. `importing.py` opens the pictures (hostile until checked), turns them
upright, crops, reduces, encodes them and writes the table.

A reader module has:

    KEY: str                      its key in the ledger
    OPTIONS: Mapping[str, tuple[str, ...]]   option -> allowed values, the first being the default
    OFFICIAL: tuple[str, ...]     the splits its own files name; the importer carves those that are missing from train
    def read(root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used: its file relative to the root, its line there (from 1; 0: it has none), and why."""

    file: str
    row: int
    reason: str


class Refuse(Exception):
    """Raised by `Face.more` when what it reads shows that the row cannot be used; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Face:
    """One face as its source gives it.

    `file` names the picture relative to the root with `/` between parts (a member of an archive: `archive.tar/member`),
    `row` its line in the label file (0 if it has none). `image` is the encoded picture: a path under the root, or the
    bytes where it comes out of an archive. `subject` is the source's own name of the person, None if unknown.
    `split` is the source's own, None if it names none. `crop` is in pixels of the upright picture and may reach beyond
    it. `labels` are columns of `faces`: `attributes` and `action_units` as plain mappings, `box` and `landmarks` in
    pixels of the upright, uncropped picture, `segmentation` as a uint8 array (height, width) of CelebAMask-HQ classes
    that covers the whole picture at any scale. `more` gives further labels that cost reading another file (and may give
    `crop`, too); it runs in a worker thread. `official`, if given, takes the place of the reader's `OFFICIAL`.
    """

    file: str
    row: int = 0
    source_id: str
    image: Path | bytes
    subject: str | None = None
    split: str | None = None
    crop: Box | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[], Mapping[str, Any]] | None = None
    official: tuple[str, ...] | None = None


class Reader(Protocol):
    """The shape of a reader module."""

    KEY: str
    OPTIONS: Mapping[str, tuple[str, ...]]
    OFFICIAL: tuple[str, ...]

    def read(self, root: Path, options: Mapping[str, str]) -> Iterator[Face | Refused]:
        """Everything under `root`. Raises UserError when a label file is missing or has not the stated form."""
