"""The two tables, and the predictions: Arrow schemas, sharded atomic writing, streaming reading, digests.

A table is a folder of Parquet shards `part-*.parquet`, `quarantine.parquet` when rows were refused, `manifest.json`.
It is written under a temporary name and renamed when whole, so a reader never sees half a table. Its digest is the
SHA-256 of the manifest (schema, row counts, SHA-256 of every shard, parents): not of paths, times or worker counts.
Maps (`attributes`, `action_units`, `groups`) are stored as lists of (name, value) pairs: `datasets` has no map type.
`image_id` names the picture as it is stored, `original_id` the file that it was made from (both SHA-256).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facemllm import digests
from facemllm.errors import UserError

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"
ROW_GROUP = 128
_QUARANTINE_GROUP = 10_000

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _pairs(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct([("name", pa.string()), ("value", value)]))


FACES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("original_id", pa.string()),
        pa.field("image", IMAGE, nullable=False),
        ("width", pa.int32()),
        ("height", pa.int32()),
        pa.field("source", pa.string(), nullable=False),
        ("source_id", pa.string()),
        ("subject_id", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        ("box", pa.list_(pa.float32())),
        ("landmarks", pa.list_(pa.list_(pa.float32()))),
        ("segmentation", IMAGE),
        ("alt_text", pa.string()),
        ("caption", pa.string()),
        ("attributes", _pairs(pa.bool_())),
        ("expression", pa.string()),
        ("age", pa.float32()),
        ("age_range", pa.string()),
        ("gender", pa.string()),
        ("ethnicity", pa.string()),
        ("skin_tone", pa.int8()),
        ("yaw", pa.float32()),
        ("pitch", pa.float32()),
        ("roll", pa.float32()),
        ("action_units", _pairs(pa.float32())),
        (
            "provenance",
            pa.list_(
                pa.struct(
                    [
                        ("field", pa.string()),
                        ("origin", pa.string()),
                        ("model_digest", pa.string()),
                        ("prompt_hash", pa.string()),
                        ("time", pa.string()),
                        ("cost", pa.float64()),
                    ]
                )
            ),
        ),
    ],
    metadata={"schema": "faces/1"},
)

CONVERSATIONS = pa.schema(
    [
        pa.field("conversation_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("images", pa.list_(IMAGE), nullable=False),
        ("segmentation", IMAGE),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        ("subject_id", pa.string()),
        ("groups", _pairs(pa.string())),
        (
            "messages",
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))),
                    ]
                )
            ),
        ),
        (
            "turns",
            pa.list_(
                pa.struct(
                    [
                        ("sample_id", pa.string()),
                        ("task", pa.string()),
                        ("form", pa.string()),
                        ("template", pa.string()),
                        ("options", pa.list_(pa.string())),
                        ("answer", pa.string()),
                        ("follows", pa.bool_()),
                    ]
                )
            ),
        ),
    ],
    metadata={"schema": "conversations/1"},
)

PREDICTIONS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        ("subject_id", pa.string()),
        pa.field("task", pa.string(), nullable=False),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("raw", pa.string()),
        ("parsed", pa.string()),
        ("scores", _pairs(pa.float64())),
        ("groups", _pairs(pa.string())),
        ("model_digest", pa.string()),
    ],
    metadata={"schema": "predictions/1"},
)

QUARANTINED = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())])

SPLITS = ("train", "validation", "test")


def subject_id(source: str, subject: str, key: bytes = b"facemllm") -> str:
    """Keyed hash of a source's subject: tells rows of one person apart from others', and gives no name away."""
    return hashlib.blake2b(f"{source}\0{subject}".encode(), key=key, digest_size=16).hexdigest()


def pairs(mapping: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A mapping as the stored list of (name, value) pairs, in name order."""
    return [{"name": name, "value": mapping[name]} for name in sorted(mapping)]


def mapping(stored: Iterable[Mapping[str, Any]] | None) -> dict[str, Any]:
    """The stored list of (name, value) pairs as a mapping; null is empty."""
    return {pair["name"]: pair["value"] for pair in stored or ()}


def provenance(
    field: str, origin: str, model_digest: str | None = None, prompt_hash: str | None = None, cost: float = 0.0
) -> dict[str, Any]:
    """An entry of `provenance`: where a field comes from (`source|annotator|expert|renderer`), at what cost.

    `time` stays empty: the same work at another hour has to give the same bytes.
    """
    return {
        "field": field,
        "origin": origin,
        "model_digest": model_digest,
        "prompt_hash": prompt_hash,
        "time": None,
        "cost": cost,
    }


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, flush it to disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _storage_error(path, error) from error


def publish(partial: Path, out: Path) -> None:
    """Flush a finished folder to disk and rename it into place. Raises UserError if `out` exists or cannot be made."""
    try:
        for file in (p for p in partial.rglob("*") if p.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    except OSError as error:
        raise _storage_error(out, error) from error


def partial_folder(out: Path) -> Path:
    """An empty folder beside `out` to build it in. Raises UserError when `out` exists or cannot be written."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another output folder or remove it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise _storage_error(out, error) from error
    return partial


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Trouble with the disk, said as a person can act on it."""
    try:
        yield
    except OSError as error:
        raise _storage_error(out, error) from error


def _storage_error(path: Path, error: OSError) -> UserError:
    reasons = {
        errno.ENOSPC: "no space left on the device; free some and run again",
        errno.EROFS: "the file system is read-only; choose another folder (storage.home, storage.runs)",
        errno.EACCES: "permission denied; choose a folder you may write to (storage.home, storage.runs)",
        errno.EPERM: "not permitted; choose a folder you may write to (storage.home, storage.runs)",
        errno.ENOTEMPTY: "exists already; another process may have written it",
        errno.EEXIST: "exists already; another process may have written it",
        errno.ENOTDIR: "a part of this path is a file, not a folder",
    }
    return UserError(f"cannot write {path}: {reasons.get(error.errno or 0, error.strerror or str(error))}")


class TableWriter:
    """Writes a table: `with TableWriter(out, FACES, parents=[...]) as table: table.write(rows)`.

    Rows keep the order they are given in and fall into row groups of fixed size, so the bytes do not depend on how the
    caller batches them. Leaving the block publishes the table; an exception in it leaves nothing behind.
    `manifest` holds the finished manifest afterwards.
    """

    def __init__(
        self,
        out: Path,
        schema: pa.Schema,
        *,
        parents: Sequence[str] = (),
        about: Mapping[str, Any] | None = None,
        shard_mb: int = 256,
    ) -> None:
        self.out = out
        self._required = [field.name for field in schema if not field.nullable]
        # `datasets` takes its own feature types from the file only where the Arrow field is nullable, as its own are
        fields = [field.with_nullable(True) for field in schema]
        self.schema = pa.schema(fields, {**(schema.metadata or {}), **huggingface_metadata(schema)})
        self.manifest: dict[str, Any] = {
            "schema": schema.metadata[b"schema"].decode(),
            "rows": 0,
            "quarantined": 0,
            "shards": [],
            "parents": list(parents),
            "about": dict(about or {}),
        }
        self._shard_bytes = shard_mb * 2**20
        self._pending: list[Mapping[str, Any]] = []
        self._held: list[pa.Table] = []
        self._held_rows = 0
        self._refused: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._quarantine: pq.ParquetWriter | None = None

    def __enter__(self) -> TableWriter:
        self._partial = partial_folder(self.out)
        return self

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows (dictionaries by column name). Raises UserError naming the row and column that do not fit."""
        for row in rows:
            self._pending.append(row)
            if len(self._pending) == ROW_GROUP:
                self._hold_pending()

    def write_table(self, table: pa.Table) -> None:
        """Append rows that are Arrow columns already: the columns of the schema, in its order.

        Raises UserError when they are not, or a required one has nulls. The bytes are those that `write` would give.
        """
        self._hold_pending()
        if table.schema.names != self.schema.names or table.schema.types != self.schema.types:
            raise UserError(f"{self.out}: the columns are not those of {self.manifest['schema']}")
        for name in self._required:
            if table.column(name).null_count:
                raise UserError(f"{self.out}: column '{name}' must not be empty")
        self._hold(pa.Table.from_arrays(table.columns, schema=self.schema))

    def quarantine(self, file: str, row: int, reason: str) -> None:
        """Note a row that was refused: the file it came from, its number there, and why."""
        self._refused.append({"file": file, "row": row, "reason": reason})
        if len(self._refused) == _QUARANTINE_GROUP:
            self._flush_refused()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._hold_pending()
                self._flush(self._held_rows)
                self._close_shard()
                self._finish()
                publish(self._partial, self.out)
        finally:
            for writer in (self._writer, self._quarantine):
                if writer is not None:
                    with suppress(OSError):
                        writer.close()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _hold_pending(self) -> None:
        if not self._pending:
            return
        names = set(self.schema.names)
        first = self.manifest["rows"] + self._held_rows
        for number, row in enumerate(self._pending, start=first):
            if unknown := set(row) - names:
                raise UserError(f"{self.out}: row {number} has unknown columns {sorted(unknown)}")
        columns = []
        for field in self.schema:
            values = [row.get(field.name) for row in self._pending]
            try:
                column = pa.array(values, field.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise UserError(f"{self.out}: column '{field.name}' does not hold {field.type}: {error}") from error
            if field.name in self._required and column.null_count:
                number = first + values.index(None)
                raise UserError(f"{self.out}: row {number}: column '{field.name}' must not be empty")
            columns.append(column)
        self._pending = []
        self._hold(pa.Table.from_arrays(columns, schema=self.schema))

    def _hold(self, table: pa.Table) -> None:
        self._held.append(table)
        self._held_rows += table.num_rows
        while self._held_rows >= ROW_GROUP:
            self._flush(ROW_GROUP)

    def _flush(self, rows: int) -> None:
        """Write the first rows that are held as one row group."""
        if not rows:
            return
        held = pa.concat_tables(self._held)
        group = held.slice(0, rows).combine_chunks()  # pages are cut along chunks, and bytes must not depend on those
        self._held, self._held_rows = [held.slice(rows)], held.num_rows - rows
        with _writing(self.out):
            if self._writer is None:
                self._path = self._partial / f"part-{len(self.manifest['shards']):05d}.parquet"
                self._shard_rows = 0
                self._writer = pq.ParquetWriter(self._path, self.schema, compression="zstd")
            self._writer.write_table(group)
            full = self._path.stat().st_size >= self._shard_bytes
        self.manifest["rows"] += rows
        self._shard_rows += rows
        if full:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        with _writing(self.out):
            writer.close()
            sha256 = digests.of_file(self._path)
        self.manifest["shards"].append({"name": self._path.name, "rows": self._shard_rows, "sha256": sha256})

    def _flush_refused(self) -> None:
        with _writing(self.out):
            if self._quarantine is None:
                self._quarantine = pq.ParquetWriter(self._partial / QUARANTINE, QUARANTINED)
            self._quarantine.write_table(pa.Table.from_pylist(self._refused, QUARANTINED))
        self.manifest["quarantined"] += len(self._refused)
        self._refused = []

    def _finish(self) -> None:
        if self._refused:
            self._flush_refused()
        with _writing(self.out):
            if self._quarantine is not None:
                writer, self._quarantine = self._quarantine, None
                writer.close()
                self.manifest["quarantine_sha256"] = digests.of_file(self._partial / QUARANTINE)
            self.manifest["digest"] = digests.of_json(self.manifest)
            text = json.dumps(self.manifest, indent=2, sort_keys=True) + "\n"
            (self._partial / MANIFEST).write_text(text, "utf-8")


@dataclass(frozen=True)
class Table:
    """A table on disk whose bytes agree with its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Name of the table: SHA-256 of its manifest."""
        return str(self.manifest["digest"])

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.manifest["rows"])

    def batches(
        self, columns: Sequence[str] | None = None, split: str | None = None, batch_rows: int = 256
    ) -> Iterator[pa.RecordBatch]:
        """Stream record batches in row order, some columns only, of one split if named. Memory is flat in rows."""
        wanted = None if columns is None else list(columns)
        read = wanted if wanted is None or split is None else list(dict.fromkeys([*wanted, "split"]))
        for shard in self.manifest["shards"]:
            # not a dataset scanner: that reads ahead without bound when its batches are taken slowly
            with pq.ParquetFile(self.path / shard["name"], pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=batch_rows, columns=read):
                    if split is not None:
                        batch = batch.filter(pc.equal(batch.column("split"), split))
                    if batch.num_rows:
                        yield batch if wanted is None else batch.select(wanted)

    def iterate(self, columns: Sequence[str] | None = None, split: str | None = None) -> Iterator[dict[str, Any]]:
        """Stream rows as dictionaries, in row order."""
        for batch in self.batches(columns, split):
            yield from batch.to_pylist()

    @property
    def sources(self) -> list[str]:
        """Ledger keys of the sources of its rows: as the manifest says, else as the rows do."""
        stated = self.manifest["about"].get("sources")
        if stated is not None:
            return sorted(map(str, stated))
        found: set[str] = set()
        for batch in self.batches(["source"], batch_rows=65536):
            found.update(pc.unique(batch.column("source")).to_pylist())
        return sorted(found)

    @property
    def terms(self) -> dict[str, Any]:
        """What a table made from this one hands on in its manifest: sources, and what may be done with them all."""
        uses = self.manifest["about"].get("uses")
        return {"sources": self.sources, **({"uses": uses} if uses is not None else {})}

    def refused(self) -> Iterator[dict[str, Any]]:
        """Stream the quarantined rows: file, row, reason."""
        if self.manifest["quarantined"]:
            with pq.ParquetFile(self.path / QUARANTINE) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()


def open_table(path: Path, schema: pa.Schema | None = None) -> Table:
    """Open a table and check every byte against its manifest.

    Raises UserError if it is no table, is of another schema, or a shard is missing, added or changed.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise UserError(f"{path} is not a table: it has no {MANIFEST}")
    try:
        manifest = json.loads(manifest_path.read_text("utf-8"))
        body = {key: value for key, value in manifest.items() if key != "digest"}
        named = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
        stated = manifest["digest"], manifest["schema"], int(manifest["rows"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest_path}: damaged manifest ({error}); make the table again") from None
    if digests.of_json(body) != stated[0]:
        raise UserError(f"{manifest_path}: the manifest does not match its own digest; make or restore the table again")
    if schema is not None and stated[1] != schema.metadata[b"schema"].decode():
        raise UserError(f"{path} is a '{stated[1]}' table; '{schema.metadata[b'schema'].decode()}' is needed here")
    present = {p.name for p in path.glob("part-*.parquet")}
    if "quarantine_sha256" in manifest:
        named[QUARANTINE] = manifest["quarantine_sha256"]
        present |= {QUARANTINE} & {p.name for p in path.iterdir()}
    if present != set(named):
        odd = sorted(present ^ set(named))
        raise UserError(f"{path}: shards differ from the manifest ({', '.join(odd)}); make or restore the table again")
    for name, sha256 in named.items():
        if digests.of_file(path / name) != sha256:
            raise UserError(f"{path / name}: bytes do not match the manifest; make or restore the table again")
    return Table(path, manifest)


def huggingface_metadata(schema: pa.Schema) -> dict[str, str]:
    """The `datasets` feature description of a schema, so that `load_dataset("parquet")` decodes images."""
    features = {field.name: _feature(field.type) for field in schema}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def _feature(kind: pa.DataType) -> Any:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    names = {"float": "float32", "double": "float64"}
    return {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}
