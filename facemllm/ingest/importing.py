"""From what a reader says to rows of `faces`: pictures opened with care, turned upright, cropped, reduced, encoded.

Pictures are worked on by a process a core inside a bounded window, and come out in the reader's order: memory does not
grow with rows, and the bytes do not depend on the number of processes. A row that
cannot be used becomes `Refused` with its file and reason; it never stops the import.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facemllm.core import digests, images
from facemllm.core.machine import cores, ordered
from facemllm.errors import UserError
from facemllm.ingest.reader import Box, Face, Reader, Refuse, Refused, contents, follow, walk
from facemllm.settings import Ingest
from facemllm.settings.data import Source
from facemllm.tables import FACES, LABELS, PAIRED, pairs, provenance, subject_id

_FAMILIES = {
    **dict.fromkeys(("agedb", "fgnet", "utkface", "morph2", "fairface"), "ages"),
    **dict.fromkeys(("raf-db", "affectnet", "emo135"), "expressions"),
    **dict.fromkeys(("lfwa", "maad-face"), "attribute_tables"),
    **dict.fromkeys(("300w-lp", "aflw2000", "biwi"), "headpose"),
    **dict.fromkeys(("bp4d", "disfa"), "action_units"),
}
_FOLDER = Path(__file__).with_name("readers")
_ALONE = {file.stem for file in _FOLDER.glob("[a-z]*.py")} - set(_FAMILIES.values())
READERS: Mapping[str, str] = {stem.replace("_", "-"): stem for stem in sorted(_ALONE)} | _FAMILIES
"""Module of `readers/` by source: of its own name, unless it is one of a family's."""

HASH = "perceptual_hashes"  # transient key of an imported row
_HERE, _CHUNK = 64, 16
_MIN_SIDE = 8


def module_of(name: str) -> str:
    """The module that holds the reader of a source. Raises UserError when there is none."""
    if name not in READERS:
        raise UserError(f"no reader for source '{name}'; there are readers for {', '.join(sorted(READERS))}")
    return f"facemllm.ingest.readers.{READERS[name]}"


def reader(name: str) -> Reader:
    """The reader of a source. Raises UserError when there is none."""
    found: Reader = import_module(module_of(name)).READERS[name]
    return found


def code_of(sources: Iterable[Source]) -> dict[str, str]:
    """Digest of the code behind each source's reader. Readers are imported by name, so the code of the step that calls
    them does not tell of theirs; this belongs into its key, so that a mended reader reads its dataset again."""
    names = sorted({source.name for source in sources} & set(READERS))
    return {name: digests.of_code(module_of(name)) for name in names}


def options_of(source: Source) -> dict[str, str]:
    """The reader's options, defaults filled in. Raises UserError for one that it does not know."""
    known = reader(source.name).options
    for name, value in source.options.items():
        if name not in known:
            raise UserError(f"source '{source.name}' has no option '{name}'; it has {', '.join(known) or 'none'}")
        if known[name] and value not in known[name]:
            raise UserError(f"option {name} of source '{source.name}' is one of {', '.join(known[name])}, not {value}")
    return {name: values[0] if values else "" for name, values in known.items()} | dict(source.options)


def folder_of(source: Source) -> Path:
    """The folder that a source lies in. Raises UserError when none is given, or it is not there."""
    if source.root is None:
        raise UserError(f"ingest.sources: '{source.name}' needs root, the folder that holds the dataset")
    folder = Path(source.root).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (root of source '{source.name}')")
    return folder


def require(source: Source) -> None:
    """Raise UserError unless a dataset's folder holds anything, its reader exists and knows the options given."""
    if source.name != "render":
        options_of(source)
        if not any(folder_of(source).iterdir()):
            raise UserError(f"{source.root}: the folder is empty (root of source '{source.name}')")


def imported(source: Source, data: Ingest, workers: int = 0) -> Iterator[dict[str, Any] | Refused]:
    """Rows of `faces` from a dataset on disk, in the reader's order, each with its perceptual hashes under `HASH`.

    Raises UserError when the folder or a label file is missing or has not the stated form.
    """
    root = folder_of(source)
    native, options = reader(source.name), options_of(source)
    follow(data.links)
    work = partial(_rows, source=source.name, root=root, data=data, official=native.official)
    items = iter(native.read(root, options))
    yield from work(islice(items, _HERE))  # a small dataset is read before a process has started
    chunks = iter(lambda: list(islice(items, _CHUNK)), [])
    for rows in ordered(work, chunks, workers or cores()):
        yield from rows


def _rows(items: Iterable[Face | Refused], source: str, root: Path, data: Ingest, official: Sequence[str]) -> list[Any]:
    follow(data.links)  # this may be another process
    return [_row(item, source, root, data, official) for item in items]


def split_of(subject: str, validation_share: float, test_share: float) -> str:
    """The split a subject belongs to: a stable hash against the shares, so that one person is in one split only."""
    point = int.from_bytes(hashlib.sha256(f"split:{subject}".encode()).digest()[:8]) / 2**64
    if point < test_share:
        return "test"
    return "validation" if point < test_share + validation_share else "train"


def fingerprint(source: Source, links: Iterable[str] = ()) -> str:
    """Digest of the names, sizes and change times of a dataset's files, and of those that `ingest.links` lets it link
    to: when it changes, the dataset is read again."""
    if source.root is None:
        return ""
    root = Path(source.root).expanduser()
    state = hashlib.sha256()
    follow(links)
    for folder, _, files in walk(root):
        for name in files:
            try:
                found = os.stat(os.path.join(folder, name))
            except OSError:
                continue
            state.update(f"{os.path.relpath(folder, root)}/{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return state.hexdigest()


def _row(item: Face | Refused, source: str, root: Path, data: Ingest, official: Sequence[str]) -> Any:
    named = item.file
    if isinstance(item, Face) and isinstance(item.image, Path):
        named = named or item.image.relative_to(root).as_posix()
    file = _printable(named)
    if isinstance(item, Refused):
        return Refused(file, item.row, _printable(item.reason))
    try:
        if file != named:
            raise Refuse("the file's name is not UTF-8; rename it")
        encoded = item.image if isinstance(item.image, bytes) else contents(item.image, root, images.MAX_BYTES)
        labels = dict(item.labels) | dict(item.more() if item.more else {})
        return _made(item, labels, encoded, source, data, official)
    except (Refuse, images.BadPicture) as error:
        return Refused(file, item.row, _printable(str(error)))


def _printable(text: str) -> str:
    """Text that a table can hold: bytes of file names that are not UTF-8 are written as \\udcXX."""
    return text.encode("utf-8", "backslashreplace").decode()


def _made(
    item: Face, labels: dict[str, Any], encoded: bytes, source: str, data: Ingest, official: Sequence[str]
) -> dict[str, Any]:
    picture = images.opened(encoded)
    if min(picture.size) < _MIN_SIDE:
        raise Refuse(f"{picture.width}x{picture.height} pixels are too few for a face")
    mask = labels.pop("segmentation", None)
    frame = _frame(labels.pop("crop", None) or item.crop, picture.size)
    scale = min(1.0, data.max_side / max(frame[2] - frame[0], frame[3] - frame[1]))
    size = (max(1, round((frame[2] - frame[0]) * scale)), max(1, round((frame[3] - frame[1]) * scale)))
    full = picture.size
    if frame != (0, 0, *full) or size != full:
        picture = picture.resize(size, Image.Resampling.LANCZOS, box=frame, reducing_gap=3.0)
    stored = images.encoded(picture)
    subject = None if item.subject is None else subject_id(source, item.subject)
    for name in PAIRED:
        if name in labels:
            labels[name] = pairs(labels[name])
    for name in ("box", "landmarks"):
        if labels.get(name) is not None:
            labels[name] = _moved(name, labels[name], frame, size)
    if (box := labels.get("box")) and (box[0] >= box[2] or box[1] >= box[3]):
        raise Refuse("the box lies outside the picture")
    if labels and mask is None and all(value in (None, []) for value in labels.values()):
        raise Refuse("every label is unknown")
    if mask is not None:
        labels["segmentation"] = {"bytes": _segmentation(mask, full, frame, size), "path": None}
    _check(labels)
    person = subject or f"{source}:{item.photo or item.source_id}"
    return labels | {
        "image_id": digests.of_bytes(stored),
        "original_id": digests.of_bytes(encoded),
        "image": {"bytes": stored, "path": None},
        "width": size[0],
        "height": size[1],
        "source": source,
        "source_id": item.source_id,
        "subject_id": subject,
        "split": _split(item.split, official if item.official is None else item.official, person, data),
        "provenance": [provenance(field, "source") for field in sorted(labels) if labels[field] not in (None, [])],
        HASH: images.perceptual_hashes(picture),
    }


def _frame(crop: Box | None, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The crop in whole pixels, inside the picture. Raises Refuse when too little is left of it."""
    if crop is None:
        return 0, 0, *size
    if not all(np.isfinite(crop)):
        raise Refuse(f"the crop {crop} is not finite")
    left, top, right, bottom = (int(np.floor(v)) if n < 2 else int(np.ceil(v)) for n, v in enumerate(crop))
    frame = (max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1]))
    if frame[2] - frame[0] < _MIN_SIDE or frame[3] - frame[1] < _MIN_SIDE:
        raise Refuse(f"the crop {tuple(round(v, 1) for v in crop)} leaves nothing of a picture of {size[0]}x{size[1]}")
    return frame


def _moved(name: str, value: Any, frame: tuple[int, int, int, int], size: tuple[int, int]) -> Any:
    """A box (4) or points (n, 2) from the picture's pixels to those of the stored crop."""
    points = np.asarray(value, np.float64).reshape(-1, 2)
    span = np.array([frame[2] - frame[0], frame[3] - frame[1]])
    moved = (points - frame[:2]) * (np.array(size) / span)
    if name == "box":
        return [float(v) for v in moved.clip(0, size).reshape(-1)]
    return [[float(x), float(y)] for x, y in moved]


def _segmentation(mask: Any, full: tuple[int, int], frame: tuple[int, int, int, int], size: tuple[int, int]) -> bytes:
    """A class map of the whole picture, at any scale, as the PNG of the stored crop. Raises Refuse when no part of a
    face is in it."""
    height, width = mask.shape
    across, down = width / full[0], height / full[1]
    box = (frame[0] * across, frame[1] * down, frame[2] * across, frame[3] * down)
    buffer = BytesIO()
    cut = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST, box=box)
    if cut.getbbox() is None:
        raise Refuse("its segmentation holds no part of a face")
    cut.save(buffer, format="PNG")
    return buffer.getvalue()


def _check(labels: Mapping[str, Any]) -> None:
    """Raises Refuse when a number among the labels is not finite, for a table must not hold NaN, or a text is blank."""
    for name, value in labels.items():
        if name not in FACES.names:
            raise ValueError(f"'{name}' is no column of the faces table")
        if name in _NUMBERS and value is not None and not _finite(value):
            raise Refuse(f"{name} is not a finite number")
        if isinstance(value, str) and not any(letter.isprintable() and not letter.isspace() for letter in value):
            raise Refuse(f"{name} is blank")


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return _finite(value["value"]) if isinstance(value, dict) else abs(value) <= _LARGEST


_LARGEST = 1e9  # far beyond any pixel, year or degree, and far within what the table's 32 bits hold
_NUMBERS = frozenset(label.name for label in LABELS if label.numeric)


def _split(own: str | None, official: Sequence[str], person: str, data: Ingest) -> str:
    """The source's own split; where it has none, one drawn by person. Splits that its files never name are carved out
    of its training split."""
    drawn = split_of(person, data.validation_share, data.test_share)
    if own is None:
        return drawn
    return own if own != "train" or drawn in official else drawn
