"""Opening and streaming a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.tables.schemas import MANIFEST, QUARANTINE


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
