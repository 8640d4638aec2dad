"""Which tables of a home hold a picture or a person. Only the columns `image_id`, `subject_id` and `split` are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facemllm.errors import UserError
from facemllm.promote.records import Records

Kind = Literal["image", "subject"]
COLUMNS: Mapping[Kind, str] = {"image": "image_id", "subject": "subject_id"}


@dataclass(frozen=True)
class Held:
    """Rows of a table that are meant: how many, of which splits."""

    rows: int
    splits: frozenset[str]


def first_tables(records: Records) -> Iterator[str]:
    """Tables that were made from no other table here: any other holds rows of these alone."""
    for record in records.all:
        made_here = any(value in records.here for value in record.materials.values())
        if record.digest in records.here and not made_here and is_table(records, record.digest):
            yield record.digest


def find(records: Records, prefix: str) -> tuple[Kind, str] | None:
    """The picture or person whose id begins so, in the tables here or among what was forgotten.

    Raises UserError when several do.
    """
    found: set[tuple[Kind, str]] = set()
    for report in records.reports:
        for kind in COLUMNS:
            found |= {(kind, one) for one in report.get("keys", {}).get(kind, ()) if one.startswith(prefix)}
    for table in first_tables(records):
        for batch in _batches(records.folder(table), records.manifest(table), COLUMNS.values()):
            for kind, column in COLUMNS.items():
                if column in batch.schema.names:
                    ids = batch.column(column).filter(pc.starts_with(batch.column(column), prefix))
                    found |= {(kind, one) for one in pc.unique(ids).to_pylist() if one is not None}
    if len(found) > 1:
        some = ", ".join(f"{kind} {one[:16]}" for kind, one in sorted(found)[:4])
        raise UserError(f"{len(found)} pictures and persons begin with {prefix} ({some}); give more digits")
    return next(iter(found), None)


def held(records: Records, table: str, kind: Kind, id: str) -> Held | None:
    """The rows of a table that are this picture's or person's; None when it holds none. A table that was deleted to
    forget them held them; of one that is not here nobody can tell."""
    for report in records.reports:
        if table in report.get("tables", {}) and id in report.get("keys", {}).get(kind, ()):
            return Held(0, frozenset(map(str, report["tables"][table])))
    rows, splits = 0, set()
    for batch in _batches(records.folder(table), records.manifest(table), [COLUMNS[kind], "split"]):
        if COLUMNS[kind] in batch.schema.names:
            own = batch.filter(pc.equal(batch.column(COLUMNS[kind]), id))
            rows += own.num_rows
            splits |= set(own.column("split").to_pylist()) if own.num_rows and "split" in own.schema.names else set()
    return Held(rows, frozenset(map(str, splits))) if rows else None


def about(records: Records, tables: Iterable[str], kind: Kind, id: str) -> dict[str, Any]:
    """What the first of the tables that holds them says: `source`, `subject_id`, and of a person how many `images`."""
    for table in tables:
        columns = ["image_id", "subject_id", "source"]
        own = [
            batch.filter(pc.equal(batch.column(COLUMNS[kind]), id))
            for batch in _batches(records.folder(table), records.manifest(table), columns)
            if {*columns} <= set(batch.schema.names)
        ]
        rows: list[dict[str, Any]] = reduce(lambda all, batch: [*all, *batch.to_pylist()], own, [])
        if rows:
            return {"source": rows[0]["source"], "subject": rows[0]["subject_id"], "images": len(rows)}
    return {}


def is_table(records: Records, digest: str) -> bool:
    """Whether a result is, or was, a table of faces or conversations."""
    return str(records.manifest(digest).get("schema", "")).startswith(("faces/", "conversations/"))


def _batches(folder: Path, manifest: Mapping[str, Any], columns: Iterable[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a table, as far as its files are here and whole; links are not followed."""
    for shard in manifest.get("shards", ()):
        path = folder / Path(str(shard.get("name"))).name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                names = [name for name in columns if name in file.schema_arrow.names]
                yield from file.iter_batches(batch_size=65_536, columns=names)
        except (pa.ArrowInvalid, OSError):
            continue
