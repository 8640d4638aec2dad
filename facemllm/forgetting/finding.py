"""Which rows are meant: from what a user names to marks by which every version of the picture or person is found.

A picture is stored under another digest when it was cropped or reduced otherwise. So the rows that are named lead to
their original file and their name in the source, and these to further rows. A mark that would catch somebody else's row
(one photograph with two faces, two files of one name) is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facemllm.core import images
from facemllm.core.files import read_json
from facemllm.errors import UserError
from facemllm.settings import Settings, root
from facemllm.tables import MANIFEST, subject_id
from facemllm.version import ledger
from facemllm.version.archive import PARQUET
from facemllm.version.repository import Repository
from facemllm.version.rewriting import held
from facemllm.version.tombstones import KEYS, Kind, Marks, Mask, Tombstones, covered_rows, name_id

_ROUNDS = 8
_FOLDERS = ("imagefolder",)  # names such as `1` recur in every folder: they tell no picture
_SHORTEST = 8


@dataclass
class Found:
    """What is known of the rows that are meant: `tables` maps a table's digest to the splits of its rows.

    `sources` are the ledger keys that the rows came from.
    """

    marks: Marks
    tables: dict[str, set[str]] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Beginning:
    """Picks rows whose picture, stored or original, has a digest that begins so."""

    digits: str

    def mask(self, batch: pa.RecordBatch) -> pa.BooleanArray:
        """True where one of the two begins with the digits."""
        found = pa.array([False] * batch.num_rows)
        for name in {"image_id", "original_id"}.intersection(batch.schema.names):
            found = pc.or_(found, pc.fill_null(pc.starts_with(batch.column(name), self.digits), False))
        return found


def meant(settings: Settings, image: str | None, subject: str | None) -> tuple[Kind, Marks]:
    """The kind and the mark of what a user names: an image_id (or 8 digits of it), a subject_id, or SOURCE:NAME.

    Raises UserError when the name has another form, fits several pictures, or its source is not in the ledger.
    """
    if (image is None) == (subject is None):
        raise UserError("name what to forget: either --image IMAGE_ID or --subject SUBJECT_ID (or SOURCE:NAME)")
    if subject is not None:
        return "subject", Marks(subject=frozenset({_subject(settings, subject.strip())}))
    digits = (image or "").strip().lower()
    if not re.fullmatch(rf"[0-9a-f]{{{_SHORTEST},64}}", digits):
        needed = f"at least {_SHORTEST} of its first digits (0-9, a-f)"
        raise UserError(f"--image '{digits[:80]}': give an image_id, or {needed}")
    known = {entry for entry in Tombstones.of(settings).marks.image if entry.startswith(digits)}
    for _, rows in groups(settings, _Beginning(digits)):
        for row in rows:
            if row["image_id"].startswith(digits):
                known.add(row["image_id"])
            elif len(digits) == 64:
                return "image", Marks(original=frozenset({digits}))
    if len(digits) == 64:
        return "image", Marks(image=frozenset({digits}))
    if len(known) != 1:
        which = ", ".join(sorted(known)[:4])
        raise UserError(
            f"--image {digits}: several pictures begin so ({which}); give more digits"
            if known
            else f"--image {digits}: no picture here begins so; give all 64 digits to keep one out that is not here"
        )
    return "image", Marks(image=frozenset(known))


def _subject(settings: Settings, text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{32}", text):
        return text
    source, colon, name = text.partition(":")
    if not colon or not name:
        raise UserError(f"--subject '{text[:80]}': give a subject_id (32 digits) or SOURCE:NAME, as in celeba:2880")
    if source not in ledger.entries(settings):
        raise UserError(f"--subject {text[:80]}: source '{source}' is not in the dataset ledger; see: facemllm ledger")
    return subject_id(source, name)


def search(settings: Settings, first: Marks) -> Found:
    """All rows of what is meant, in every revision and table, and all marks that tell them and nobody else's.

    Reads the columns that tell rows apart, once or twice.
    """
    sure, refused = first, Marks()
    for _ in range(_ROUNDS):
        found, candidates = Found(sure), Marks()
        tables = [(digest, list(rows)) for digest, rows in groups(settings, sure) if rows]
        for digest, rows in tables:
            found.sources |= {row["source"] for row in rows if row.get("source")}
            if digest:
                found.tables.setdefault(digest, set()).update(row["split"] for row in rows if row.get("split"))
            candidates |= _marks_of(rows)
        new = _without(candidates, sure | refused)
        if not new:
            return found
        bad = _ambiguous(groups(settings, sure | new), sure, new)
        refused |= bad
        sure |= _without(new, bad)
    return Found(sure)


def perceptual_hashes(settings: Settings, marks: Marks) -> Marks:
    """Those of the rows' pictures, as far as their bytes are on this machine. Reads only those rows' pictures."""
    files = [file for table in tables_here(settings).values() for file in table]
    repository = Repository.of(settings)
    places = [repository.path / ".dvc", *([Path(repository.remote)] if "://" not in repository.remote else [])]
    files += [file for place in places for file in files_under(place, lambda name: True) if is_parquet(file)]
    found: set[str] = set()
    for file in files:
        if not rows_of(file, marks):
            continue
        with pq.ParquetFile(file) as opened:
            columns = [name for name in (*KEYS, "image") if name in opened.schema_arrow.names]
            if "image" not in columns:
                continue
            for batch in opened.iter_batches(batch_size=256, columns=columns):
                for picture in batch.filter(marks.mask(batch)).column("image").to_pylist():
                    with suppress(images.BadPicture):
                        found.add(images.perceptual_hash(images.opened(picture["bytes"] or b"")).hex())
    return Marks(look=frozenset(found))


def groups(settings: Settings, marks: Mask) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The picked rows of every table by its digest: those of recorded revisions, then those that lie on this machine.

    A table that is both is listed twice; "" stands for a file that belongs to no whole table.
    """
    for revision in held(settings, marks):
        for name, rows in revision.rows.items():
            yield revision.digests[name], rows
    for folder, files in tables_here(settings).items():
        rows = [row for file in files for row in rows_of(file, marks) or ()]
        yield digest_of(folder), rows


def tables_here(settings: Settings) -> dict[Path, list[Path]]:
    """Parquet files under home, runs and `data/` by the folder they make a table of, and objects of `dvc repro`."""
    found: dict[Path, list[Path]] = {}
    for place in (settings.home / "store", settings.home / "work", settings.runs, root() / "data"):
        for file in files_under(place, lambda name: name.endswith(".parquet")):
            found.setdefault(file.parent, []).append(file)
    for file in files_under(root() / ".dvc", lambda name: True):
        if is_parquet(file):
            found.setdefault(file, []).append(file)
    return found


def files_under(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Files below a folder whose name is wanted, in name order; links are not followed."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(place, name) for name in sorted(names) if wanted(name) and not Path(place, name).is_symlink())


def is_parquet(file: Path) -> bool:
    """Whether a file begins as Parquet does."""
    with file.open("rb") as stream:
        return stream.read(len(PARQUET)) == PARQUET


def rows_of(file: Path, marks: Mask) -> list[dict[str, Any]] | None:
    """The picked rows of a Parquet file; None when it is damaged or cut short, so that nobody can tell."""
    try:
        with pq.ParquetFile(file) as opened:
            return list(covered_rows(opened, marks))
    except (pa.ArrowInvalid, OSError):
        return None


def digest_of(folder: Path) -> str:
    """The digest that a table's manifest states; "" for anything else."""
    return str(read_json(folder / MANIFEST).get("digest", ""))


def _marks_of(rows: Sequence[Mapping[str, Any]]) -> Marks:
    """All marks of rows but their subject."""
    return Marks(
        image=frozenset(row["image_id"] for row in rows),
        original=frozenset(row["original_id"] for row in rows if row.get("original_id")),
        name=frozenset(
            name_id(row["source"], row["source_id"])
            for row in rows
            if row.get("source_id") and row["source"] not in _FOLDERS
        ),
    )


def _without(marks: Marks, others: Marks) -> Marks:
    return Marks(*(getattr(marks, name) - getattr(others, name) for name in Marks.__dataclass_fields__))


def _ambiguous(tables: Iterator[tuple[str, list[dict[str, Any]]]], sure: Marks, new: Marks) -> Marks:
    """Those of the new originals and names that, in some table, also stand for pictures that are not meant.

    Where a table holds a picture that is meant, they may add no other; where it holds none, they may name one only.
    """
    bad = Marks()
    for _, rows in tables:
        for kind in ("original", "name"):
            pictures: dict[str, set[str]] = {}
            for row in rows:
                for mark in getattr(_marks_of([row]), kind) & getattr(new, kind):
                    pictures.setdefault(mark, set()).add(row["image_id"])
            certain = {row["image_id"] for row in rows if sure.covers(row)}
            for mark, named in pictures.items():
                if (named & certain and named - certain) or (not named & certain and len(named) > 1):
                    bad |= Marks(**{kind: frozenset({mark})})
    return bad
