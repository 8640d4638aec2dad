"""Tables on disk: writing one, opening one, streaming its rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facemllm.core import digests
from facemllm.core.files import partial_folder, publish, writing
from facemllm.errors import UserError
from facemllm.tables.schemas import MANIFEST, QUARANTINE, QUARANTINED, huggingface_metadata

ROW_GROUP = 128
_QUARANTINE_GROUP = 10_000
_ASIDE = "aside.parquet"


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
        self._aside: pq.ParquetWriter | None = None
        self._rows_aside = 0

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

    def defer(self, row: Mapping[str, Any]) -> None:
        """Put a row aside, on disk, until it is known whether it stays; raises UserError as `write` does. The rows come
        back from `deferred`."""
        self._pending.append(row)
        if len(self._pending) == ROW_GROUP:
            self._put_aside()

    def deferred(self) -> Iterator[pa.Table]:
        """The rows that were put aside, in order, a few at a time, for `write_table`."""
        self._put_aside()
        if self._aside is None:
            return
        with writing(self.out):
            self._aside.close()
        self._aside, path = None, self._partial / _ASIDE
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(ROW_GROUP):
                yield pa.Table.from_batches([batch])
        path.unlink()

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
            for writer in (self._writer, self._quarantine, self._aside):
                if writer is not None:
                    with suppress(OSError):
                        writer.close()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _hold_pending(self) -> None:
        if self._pending:
            self._hold(self._taken())

    def _put_aside(self) -> None:
        if not self._pending:
            return
        rows = self._taken()
        with writing(self.out):
            if self._aside is None:
                # a Parquet file, so that `forget` finds the pictures in it when a process was killed here
                self._aside = pq.ParquetWriter(
                    self._partial / _ASIDE,
                    self.schema,
                    compression="none",
                    use_dictionary=False,
                    write_statistics=False,
                )
            self._aside.write_table(rows)
        self._rows_aside += rows.num_rows

    def _taken(self) -> pa.Table:
        """The pending rows as columns. Raises UserError naming the row and column that do not fit."""
        names = set(self.schema.names)
        first = self.manifest["rows"] + self._held_rows + self._rows_aside
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
        return pa.Table.from_arrays(columns, schema=self.schema)

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
        with writing(self.out):
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
        with writing(self.out):
            writer.close()
            sha256 = digests.of_file(self._path)
        self.manifest["shards"].append({"name": self._path.name, "rows": self._shard_rows, "sha256": sha256})

    def _flush_refused(self) -> None:
        with writing(self.out):
            if self._quarantine is None:
                self._quarantine = pq.ParquetWriter(self._partial / QUARANTINE, QUARANTINED)
            self._quarantine.write_table(pa.Table.from_pylist(self._refused, QUARANTINED))
        self.manifest["quarantined"] += len(self._refused)
        self._refused = []

    def _finish(self) -> None:
        if self._refused:
            self._flush_refused()
        with writing(self.out):
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
